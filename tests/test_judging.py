"""Judges are asked in both orders, about each question once; their verdicts become ranks, and a report on the judge."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from judge_plugins import JUDGES

from alignkit.cli import main
from alignkit.judging import read_samples
from alignkit.judging.comparing import Way

GROWING = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh", "iiiiiiiii"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> Path:
    """An empty folder, with the judges of this test and a store of their verdicts."""
    install("tests", JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path


def write(rows: Sequence[dict[str, Any]], file: str = "samples.jsonl") -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("ranked.jsonl").unlink(missing_ok=True)  # of other samples
    return file


def rows_of(*answers: Sequence[str]) -> list[dict[str, Any]]:
    return [{"prompt": f"p{number}", "responses": list(texts)} for number, texts in enumerate(answers)]


def asked() -> list[str]:
    """The questions that judges were asked since the last call."""
    file = Path(os.environ["ASKED"])
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def rank(judge: str, *arguments: str, status: int = 0) -> list[list[int]]:
    assert main(["rank", "samples.jsonl", "--by", judge, "-p", "tests", "-o", "ranked.jsonl", *arguments]) == status
    return [] if status else [json.loads(line)["ranks"] for line in Path("ranked.jsonl").read_text().splitlines()]


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_a_judge_that_always_prefers_the_first_answer_gives_only_ties_and_is_called_unreliable(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(rows_of(GROWING[:2], GROWING[:4], GROWING))

    assert rank("first", "--report", "report.json") == [[0] * 2, [0] * 4, [0] * 9]
    report = json.loads(Path("report.json").read_text())
    assert (report["consistency"], report["first_place"]) == (0, 1)
    printed = capsys.readouterr().out
    assert (
        "kept 0.0% ± 0.0% of its verdicts when the answers were swapped; preferred the first answer in 100.0%"
        in printed
    )
    assert "warning: this judge is not reliable" in printed


@pytest.mark.parametrize(
    ("judge", "answers", "questions"),
    [
        ("right", 2, 2),
        ("right", 4, 12),  # each of 6 pairs in both orders
        ("lister", 4, 12),
        ("lister", 5, 2),  # all at once, and the reversed list
        ("lister", 9, 2),
        ("by-itself", 4, 1),
        ("by-itself", 9, 1),
    ],
)
def test_a_judge_that_is_right_gives_the_right_ranks(folder: Path, judge: str, answers: int, questions: int) -> None:
    orders = [GROWING[:answers], GROWING[:answers][::-1]]
    write(rows_of(*orders))

    down = list(range(answers))
    assert rank(judge) == [down[::-1], down]
    assert len(asked()) == 2 * questions


@pytest.mark.parametrize("answers", [5, 6, 7, 8, 9])
def test_a_judge_of_pairs_sorts_more_than_four_answers_in_both_orders(folder: Path, answers: int) -> None:
    """A merge sort of 9 makes at most 21 comparisons, where there are 36 pairs."""
    texts = [GROWING[index] for index in (3, 0, 8, 1, 5, 7, 2, 6, 4) if index < answers]
    write(rows_of([*texts, texts[0]]))  # a text that is there twice ties with itself

    expected = [sorted(map(len, texts), reverse=True).index(len(text)) for text in texts]
    (ranks,) = rank("right")
    assert ranks[-1] == ranks[0]
    assert [sorted(set(ranks)).index(own) for own in ranks[:-1]] == expected
    questions = asked()
    assert len(questions) == len(set(questions)) <= 2 * {5: 8, 6: 11, 7: 14, 8: 17, 9: 21}[answers]
    first = [line for line in questions if "answers=('a', " in line]
    second = [line for line in questions if ", 'a')" in line]
    assert len(first) == len(second) > 0


def test_a_cycle_gives_equal_ranks_and_equal_answers_are_not_asked_about(folder: Path) -> None:
    write(rows_of(["rock", "paper", "scissors"], ["rock", "scissors", "rock"], ["rock", "rock"]))

    assert rank("cycle") == [[0, 0, 0], [0, 1, 0], [0, 0]]
    assert len(asked()) == 6 + 2


def test_a_noisy_judge_recovers_a_known_order(folder: Path) -> None:
    """Right with p = 0.75: both orders agree on the right answer in 56 %, on the wrong one in 6 %, else tie."""
    write(rows_of(*[GROWING[:4]] * 200))
    ranks = rank("noisy", "--report", "report.json")
    means = [statistics.fmean(column) for column in zip(*ranks, strict=True)]
    report = json.loads(Path("report.json").read_text())

    assert means == sorted(means, reverse=True)
    # the orders of a pair agree with p = 0.75² + 0.25² = 0.625
    assert report["consistency"] == pytest.approx(0.625, abs=4 * report["consistency_error"])
    assert 0 < report["consistency_error"] < 0.05
    assert report["first_place"] == pytest.approx(0.5, abs=4 * report["first_place_error"])
    assert report["length_correlation"] > 0.5

    write(rows_of(*[GROWING] * 50))
    sorted_means = [statistics.fmean(column) for column in zip(*rank("noisy"), strict=True)]
    assert statistics.correlation(sorted_means, range(9)) < -0.9


def test_the_costs_of_a_graded_judge_are_added_over_both_orders(folder: Path) -> None:
    """It adds 2 for the first place, so its verdicts differ between the orders; the sum is right for any lengths."""
    write(rows_of(["a", "bb"], ["aa", "bb"]))

    assert rank("graded", "--report", "report.json") == [[1, 0], [0, 0]]
    assert json.loads(Path("report.json").read_text())["consistency"] == 0


def test_a_row_without_a_verdict_is_left_out_and_counted_not_tied(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(rows_of(["a", "bb"], ["a", "bb", "refused"], ["refused", "refused"]))

    assert rank("picky") == [[1, 0], [0, 0]]  # the last row has one answer, twice
    assert "left out 1 rows: picky gave no verdict on at least one of their pairs" in capsys.readouterr().out
    assert rank("silent") == [[0, 0]]
    assert len(asked()) == 2 + 6 + 2 + 6
    assert rank("silent") == [[0, 0]]
    assert asked() == []  # a refusal is not asked for again either


# --- the store, the budget, the dry run ------------------------------------------------------------------------------


def test_a_question_is_asked_once_unless_the_settings_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(rows_of(GROWING[:3], GROWING[:4]))
    ranks = rank("noisy")
    assert len(asked()) == 6 + 12

    assert rank("noisy", "judge.pause=0.001") == ranks  # a setting that does not affect verdicts
    assert asked() == []
    assert "0 requests to noisy; 18 verdicts were stored already" in capsys.readouterr().out
    rank("noisy", "judge.seed=1")
    assert len(asked()) == 18
    rank("right")
    assert len(asked()) == 18
    Path("samples.jsonl").write_text(Path("samples.jsonl").read_text().replace("p1", "p2"))
    rank("right")
    assert len(asked()) == 12
    rank("unstored")
    rank("unstored")
    assert len(asked()) == 2 * 18
    write(rows_of(["no secret", "a secret!"]))
    rank("right")
    stored = b"".join(file.read_bytes() for file in (folder / "cache" / "alignkit").iterdir())
    assert len(stored) > 1000
    assert b"secret" not in stored


def test_a_killed_command_goes_on_and_asks_nothing_twice(folder: Path) -> None:
    write(rows_of(*[GROWING[:4]] * 10))
    command = [sys.executable, "-m", "alignkit", "rank", "samples.jsonl", "--by", "right", "-p", "tests"]
    command += ["-o", "ranked.jsonl", "judge.pause=0.05"]
    path = os.pathsep.join(["site", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "ALIGNKIT_DEBUG": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while len(Path("asked").read_text().splitlines() if Path("asked").exists() else []) < 15:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    before = asked()
    assert not Path("ranked.jsonl").exists()

    assert rank("right") == [[3, 2, 1, 0]] * 10
    after = asked()
    assert len(set(before + after)) == 120
    assert len(before + after) <= 121  # the verdict that was on its way when the process was killed


def test_a_budget_ranks_what_it_suffices_for_and_the_next_command_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(rows_of(GROWING[:4], GROWING[:3], GROWING[:5], GROWING[:2]))  # 12, 6, at most 16, and 2 requests

    assert rank("right", "--limit", "14") == [[3, 2, 1, 0]]
    assert len(asked()) == 14
    assert (
        "3 rows are not ranked: --limit 14 is used up. Run the same command again to continue"
        in capsys.readouterr().out
    )
    assert len(rank("right", "--limit", "14")) >= 2
    assert len(rank("right", "--limit", "14")) == 4
    questions = asked()
    assert len(questions) == len(set(questions)) <= 22


def test_a_dry_run_counts_the_requests_and_asks_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(rows_of(GROWING[:4], GROWING[:3], ["a", "a"]))
    dry = ["rank", "samples.jsonl", "--by", "right", "-p", "tests", "--dry-run"]
    assert main(dry) == 0
    # the pairs of (1, 2, 3, 4) have 5 * 6 characters and those of (1, 2, 3) have 12, in both orders
    assert capsys.readouterr().out == "right would get 18 requests with 84 tokens in all for 3 rows.\n"
    assert asked() == []
    rank("right", "--limit", "12")
    assert len(asked()) == 12
    capsys.readouterr()
    main(dry)
    assert "6 requests with 24 tokens in all for 3 rows. 12 verdicts are stored already" in capsys.readouterr().out
    rank("right")
    assert len(asked()) == 6

    write(rows_of(GROWING))
    main(dry)
    assert "at most 42 requests with at most 714 tokens" in capsys.readouterr().out  # 42 * (8 + 9)
    rank("right")
    assert len(asked()) <= 42


def test_an_error_of_a_judge_keeps_the_verdicts_until_then(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(rows_of(["a", "bb"], ["a", "broken"]))
    rank("failing", status=2)

    assert len(asked()) == 3
    error = capsys.readouterr().err
    assert "error: no such model. 2 verdicts are stored, up to 2 requests are left: run the command again to" in error
    assert not Path("ranked.jsonl").exists()
    write(rows_of(["a", "bb"]))
    assert rank("failing") == [[1, 0]]
    assert asked() == []


@pytest.mark.parametrize(
    ("judge", "arguments", "message"),
    [
        (
            "few",
            [],
            "plugin tests (alignkit-tests 0.1): its judge 'few' returned [0], expected for each question",
        ),
        ("words", [], "its judge 'words' returned 'ab', expected for each question a list with one rank per answer"),
        ("empty", [], "its judge 'empty' returned 0 verdicts for 2 questions"),
        ("endless", [], "its judge 'endless' returned more verdicts than the 2 questions"),
        ("crashes", [], "its judge 'crashes' failed: IndexError: list index out of range"),
        ("nothing", [], "build of its judge 'nothing' returned None, expected a function. Is a `return` missing?"),
        ("right", ["judge.sed=1"], "unknown key judge.sed. Did you mean 'seed'? Valid keys: pause, seed"),
        ("right", ["seed=1"], "unknown key seed: the settings of --by right are judge.KEY=VALUE"),
        ("rihgt", [], "Did you mean 'right'?"),
        ("reward-model", [], "judge 'reward-model' needs a run of stage rm: add judge.path=RUN"),
        ("function", [], "judge 'function' needs judge.call=module:function"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], judge: str, arguments: list[str], message: str
) -> None:
    write(rows_of(["a", "bb"]))
    rank(judge, *arguments, status=2)

    assert message in capsys.readouterr().err


def test_a_judge_reads_a_prompt_as_training_does(tmp_path: Path) -> None:
    """The content of a turn may be a list of parts."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit."}]}]
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({"prompt": parts, "responses": ["fig", "plum"]}))

    (sample,) = read_samples(file)

    assert sample.item.prompt == [{"role": "user", "content": "Name a fruit."}]
    assert sample.row["prompt"] == parts  # as the output has it


def test_requests_are_counted_as_a_merge_sort_makes_them() -> None:
    pairs, lists = Way(2, True), Way(None, True)

    assert [pairs.requests(GROWING[:k]) for k in range(1, 10)] == [0, 2, 6, 12, 16, 22, 28, 34, 42]
    assert [lists.requests(GROWING[:k]) for k in (4, 5, 9)] == [12, 2, 2]
    assert Way(5, True).requests(GROWING[:6]) == 22
    assert Way(2, False).requests(GROWING[:4]) == 6
    assert [pairs.sorts(GROWING[:k]) for k in (4, 5)] == [False, True]
    assert all(2 * len(list(itertools.combinations(range(k), 2))) >= pairs.requests(GROWING[:k]) for k in range(1, 10))


@pytest.mark.parametrize("way", [Way(2, True), Way(2, False), Way(None, False)])
def test_answers_that_are_all_equal_are_a_tie_without_a_question(way: Way) -> None:
    asking = way.compare([{"role": "user", "content": "p"}], ["a", "a"])
    assert next(asking, []) == []
    assert way.requests(["a", "a"]) == 0
    with pytest.raises(StopIteration) as done:
        asking.send([])
    assert done.value.value.ranks == [0, 0]
