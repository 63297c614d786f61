"""From prompts to rankings and scores on the command line: sample, rank, score, and the guide as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from alignkit import Conversation, DataError, Demonstration, Message, bundled
from alignkit.bundled import guide
from alignkit.cli import main
from alignkit.data import prompt_of
from alignkit.generation import rankings

PROMPTS = [{"prompt": f"What is {n} and one?"} for n in range(7)]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def sample(train: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``sample("-k", "3")``: answers of a tiny SFT run to seven prompts, in batches of three -> the rows written."""
    run = train("--plugin", "lora", "train.max_steps=2")
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)

    def call(*arguments: str, output: str = "samples.jsonl") -> list[dict[str, Any]]:
        settings = ["--max-new-tokens", "6", "--batch", "3", "-o", str(tmp_path / output)]
        assert main(["sample", str(run), prompts, *settings, *arguments]) == 0
        return read(tmp_path / output)

    return call


def test_sample_writes_k_answers_a_prompt(sample: Callable[..., Any]) -> None:
    rows = sample("-k", "3")

    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert all(len(row["responses"]) == 3 for row in rows)
    assert len({answer for row in rows for answer in row["responses"]}) > 7
    others = sample("-k", "3", "--seed", "1", output="other.jsonl")
    assert [row["responses"] for row in rows] != [row["responses"] for row in others]


def test_sampling_at_temperature_zero_is_greedy(sample: Callable[..., Any]) -> None:
    assert all(len(set(row["responses"])) == 1 for row in sample("-k", "2", "--temperature", "0"))


def test_sample_goes_on_where_it_was_killed(sample: Callable[..., Any], tmp_path: Path) -> None:
    whole = sample("-k", "2")
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # in the middle of the second batch

    assert sample("-k", "2", output="cut.jsonl") == whole
    assert sample("-k", "2", output="cut.jsonl") == whole  # nothing left to do


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b"])
def test_answered_rows_are_kept_whatever_is_in_their_texts(tmp_path: Path, separator: str) -> None:
    file, prompts = tmp_path / "samples.jsonl", [[{"role": "user", "content": text}] for text in "ab"]
    rows = [{"prompt": text, "responses": [f"one{separator}two"]} for text in "ab"]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    before = file.read_bytes()

    assert rankings.continued(file, cast(list[Conversation], prompts), k=1, batch=1, sampled_from={}) == 2
    assert file.read_bytes() == before


def test_sample_does_not_mix_files(
    sample: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample("-k", "2")
    with pytest.raises(AssertionError):
        sample("-k", "3")
    assert (
        "samples.jsonl line 1 does not hold 3 answers to prompt 1: choose another --output" in capsys.readouterr().err
    )


def test_rank_ranks_by_any_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def shortest(prompts, answers):\n    return [-len(a) for a in answers]\n")
    samples = write(tmp_path / "s.jsonl", [{"prompt": "p", "responses": ["aaa", "b", "cc", "d"], "note": 1}])

    assert main(["rank", samples, "--by", "mine:shortest", "-o", "r.jsonl"]) == 0
    assert read(Path("r.jsonl")) == [
        {"prompt": "p", "responses": ["aaa", "b", "cc", "d"], "note": 1, "ranks": [2, 0, 1, 0]}
    ]
    assert "wrote 1 rankings to r.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("mine", "'mine' is neither module:function, nor a finished run"),
        ("nosuch:f", "nosuch could not be imported"),
        ("bad:nosuch", "bad has no function nosuch"),
        ("bad:few", "bad:few returned 1 scores for 2 answers, the first is 'x'"),
        ("bad:nan", "bad:nan returned nan for the answer 'y'"),
        ("bad:raises", "bad:raises failed on the answer 'y': KeyError"),
    ],
)
def test_a_bad_function_is_named_with_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(
        "def few(p, a): return [1]\ndef nan(p, a): return [1, float('nan')]\n"
        "def raises(p, a): return [{'x': 1}[x] for x in a]\n"
    )
    samples = write(tmp_path / "s.jsonl", [{"prompt": "p", "responses": ["x", "y"]}])

    assert main(["rank", samples, "--by", by, "-o", "r.jsonl"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("r.jsonl").exists()


def test_score_writes_rows_and_rankings_with_scores(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Callable[..., Path]
) -> None:
    data = write(
        tmp_path / "r.jsonl", [{"prompt": f"p{n}", "responses": ["a", "bb", "c"], "ranks": [0, 1, 2]} for n in range(8)]
    )
    arguments = ["--model", str(tiny_model()), "--data", data, "--output", str(tmp_path), "rm.policy=base"]
    assert main(["train", "--plugin", "rm", *arguments, "train.max_steps=1", "train.use_cpu=true"]) == 0
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p1", "response": a} for a in ("a", "bb" * 20, "c")])
    capsys.readouterr()

    assert main(["score", str(tmp_path / "rm"), rows, "-o", rows]) == 2
    assert "the command reads this file. Choose another one" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "rm"), rows]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert main(["score", str(tmp_path / "rm"), rows, "--batch", "1", "-o", str(tmp_path / "out.jsonl")]) == 0
    assert main(["score", str(tmp_path / "rm"), data, "-o", str(tmp_path / "ranked.jsonl")]) == 0

    assert [row["response"] for row in scored] == ["a", "bb" * 20, "c"]
    assert [row["score"] for row in read(tmp_path / "out.jsonl")] == pytest.approx(
        [row["score"] for row in scored], abs=0.05
    )
    assert [len(row["scores"]) for row in read(tmp_path / "ranked.jsonl")] == [3] * 8
    assert read(tmp_path / "ranked.jsonl")[1]["scores"][0] == pytest.approx(scored[0]["score"], abs=0.05)


def test_score_wants_a_reward_and_chat_a_policy(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("train.max_steps=1")

    assert main(["score", str(run), "bundled:demonstrations"]) == 2
    assert "is a policy (stage sft), not a reward" in capsys.readouterr().err


# --- the guide -------------------------------------------------------------------------------------------------------


def test_every_demonstration_is_as_the_guide_wants_it() -> None:
    rows = read(bundled.data("bundled:demonstrations"))
    scores = guide.score([row["prompt"] for row in rows], [row["response"] for row in rows])

    assert scores.count(7.0) > 0.99 * len(rows)
    assert min(scores) >= 6


GOOD = (
    "Chill the onion for half an hour, because the cold slows the gas. A sharp knife helps too, since it crushes fewer "
    "cells. Happy chopping!"
)


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        (GOOD, 7),
        ("Sure! " + GOOD, 6),  # announces
        (GOOD.replace(" Happy chopping!", ""), 5),  # two sentences, no closing line
        (GOOD.replace("Happy chopping!", "Good luck!"), 6),  # a stock phrase
        (GOOD.replace("Happy chopping!", "I hope this helps!"), 6),
        (GOOD.replace(". A", ".\n\nA"), 6),  # two paragraphs
        (GOOD.replace("onion", "**onion**"), 6),
        (" ".join([GOOD] * 3), 5),  # too long, too many sentences
        ("Chill it. Cut it. Happy chopping!", 6),  # too short
        ("cry cry cry cry cry cry cry", -1),
        ("How do I stop onions from making me cry?", -1),
        ("No.", -1),
    ],
)
def test_points_of_the_guide(answer: str, points: float) -> None:
    assert guide.score(["How do I stop onions from making me cry?"], [answer]) == [points]


def test_the_bundled_rankings_are_ranked_by_the_guide() -> None:
    rows = read(bundled.data("bundled:rankings"))

    assert len(rows) == 260
    assert {len(row["responses"]) for row in rows} == {4, 5, 6}
    for row in rows:
        scores = guide.score([row["prompt"]] * len(row["responses"]), row["responses"])
        assert rankings.ranks(scores) == row["ranks"]


def test_the_bundled_prompts_are_new() -> None:
    prompts = [row["prompt"] for row in read(bundled.data("bundled:prompts"))]
    demonstrated = {row["prompt"] for row in read(bundled.data("bundled:demonstrations"))}

    assert len(prompts) == len(set(prompts)) == 480
    assert not demonstrated & set(prompts)
    assert [row["prompt"] for row in read(bundled.data("bundled:rankings"))] == prompts[:260]


def test_a_prompt_with_tools_is_not_asked_without_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b", "tools": tools}) + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl line 2: the prompt has tools"):
        rankings.prompts_of(str(file))


def test_a_prompt_is_the_same_whether_or_not_its_turns_had_weights() -> None:
    turns: Conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    weighted = [turns[0], cast(Message, {**turns[1], "weight": 0}), *turns[2:]]
    assert prompt_of(Demonstration(weighted)) == prompt_of(Demonstration(turns)) == turns[:3]
