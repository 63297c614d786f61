"""The reward ``judge`` in PPO: samples are compared with each other, a single answer with those in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from judge_plugins import JUDGES
from ppo_runs import GOLD, LEARN, PROMPTS, SMALL, iterations, logs, ppo

from alignkit import Answers
from alignkit.cli import main
from alignkit.registry import Registry

BASELINE = ["zzz", "eee", "zez"]  # with 0, 3 and 1 times the letter e


@pytest.fixture
def judges(folder: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> list[str]:
    """The arguments that select the reward. Answers to every prompt are in ``baseline.jsonl``."""
    install("tests", JUDGES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    rows = [{**row, "responses": BASELINE} for row in PROMPTS]
    Path("baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["ppo.policy=base", "--plugin", "tests", "reward.name=judge"]


LETTERS = "reward.judge.name=letters"


def test_ppo_learns_from_comparisons_of_samples_and_is_evaluated_against_a_baseline(judges: list[str]) -> None:
    learn = [word for word in LEARN if not word.startswith(("ppo.policy", "reward."))]
    run = ppo(
        *judges,
        *learn,
        LETTERS,
        "reward.baseline=baseline.jsonl",
        "ppo.samples_per_prompt=4",
        "ppo.kl_coef=0",
        "ppo.iterations=25",
        "ppo.eval_every=25",
    )
    evaluations = [line for line in logs(run) if "eval_score" in line]

    # the samples of a prompt share 0.5 wins each, so the mean does not show what is learned: the baseline does
    assert [line["score"] for line in iterations(run)] == pytest.approx([0.5] * 25)
    assert evaluations[-1]["eval_score"] > evaluations[0]["eval_score"] + 0.2
    for row in map(json.loads, (run / "answers.jsonl").read_text().splitlines()):
        letters = row["answer"].count("e")
        wins = [(letters > other) + 0.5 * (letters == other) for other in (0, 3, 1)]
        assert row["score"] == pytest.approx(sum(wins) / 3, abs=1e-4)


def test_a_single_answer_is_compared_with_the_baseline_in_training_too(judges: list[str]) -> None:
    run = ppo(*judges, LETTERS, "reward.judge.seed=3", "reward.baseline=baseline.jsonl", "ppo.iterations=1")
    record = json.loads((run / "alignkit.json").read_text())

    assert 0 < iterations(run)[0]["score"] < 1
    assert record["config"]["stages"]["ppo"]["reward"]["judge"] == {"name": "letters", "seed": 3, "pause": 0.0}


def test_scores_by_hand(judges: list[str]) -> None:
    from alignkit_judges.config import RewardConfig
    from alignkit_judges.reward import win_rate

    registry = Registry()
    registry.activate("tests")
    first, second = ([{"role": "user", "content": row["prompt"]}] for row in PROMPTS[:2])

    def scores(judge: str, samples: int, prompts: list[Any], texts: list[str]) -> list[float]:
        stage = SimpleNamespace(config=SimpleNamespace(samples_per_prompt=samples))
        config = SimpleNamespace(stage=stage, train={})
        run: Any = SimpleNamespace(config=config, registry=registry, say=print)
        score = win_rate(RewardConfig(judge={"name": judge}, baseline="baseline.jsonl"), run)
        return score(Answers(prompts, texts, [[0]] * len(texts), [[0]] * len(texts)))

    # ee beats z and its other two tie with it or with each other; the second prompt is a group of its own
    texts = ["ee", "z", "ee", "e", "e", "eee"]
    expected = [(0.5 + 1 + 1) / 3, 0, (0.5 + 1 + 1) / 3, 1 / 3, 0, 1]
    assert scores("letters", 4, [first] * 4 + [second] * 2, texts) == pytest.approx(expected)
    # one to a prompt: against 0, 3 and 1 letters, also where equal prompts are next to each other
    assert scores("letters", 1, [first, first], ["ee", "e"]) == pytest.approx([2 / 3, 1.5 / 3])
    assert scores("letters", 4, [first], ["eeee"]) == [1]
    # without a verdict on a pair, the others count; without any, there is no score
    refused = scores("no-a", 3, [first] * 3, ["ae", "e", "ee"])
    assert str(refused) == "[nan, 0.0, 1.0]"


def test_rows_of_the_baseline_with_one_prompt_add_up(tmp_path: Path) -> None:
    """As in two files of samples that were joined."""
    from alignkit_judges.reward import read_baseline

    rows = [{"prompt": "a", "responses": ["1", "2"]}, {"prompt": "b", "responses": ["3"]}]
    rows.append({"prompt": [{"role": "user", "content": "a"}], "responses": ["4"]})
    (tmp_path / "joined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert list(read_baseline(str(tmp_path / "joined.jsonl")).values()) == [["1", "2", "4"], ["3"]]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_answer_without_a_verdict_stops_the_run_or_is_left_out(
    judges: list[str], on_error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*judges, "reward.judge.name=no-a", "ppo.samples_per_prompt=4", "ppo.iterations=2", "data.eval_size=0"]
    given += ["ppo.batch_size=16", f"reward.on_error={on_error}"]
    if on_error == "stop":
        assert main(["train", "--plugin", "ppo", *SMALL, *given]) == 2
        assert "reward 'judge' returned nan for the answer" in capsys.readouterr().err
    else:
        assert 0 < sum(line["reward_errors"] for line in iterations(ppo(*given))) < 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reward.judge must name a judge: set reward.judge.name. Judges: "),
        ([LETTERS, "reward.judge.sed=1"], "unknown key reward.judge.sed. Did you mean 'seed'? Valid keys: "),
        (["reward.judge.name=leters"], "no active plugin provides judge 'leters'. Did you mean 'letters'?"),
        (["reward.judge.name=function"], "judge 'function' needs reward.judge.call=module:function"),
        (["reward.judge.name=reward-model"], "needs a run of stage rm: add reward.judge.path=RUN"),
        (["reward.judge.name=reward-model", "reward.judge.path=base"], "reward.judge.path: base is not a finished run"),
        ([LETTERS], "Set ppo.samples_per_prompt to 2 or more, or reward.baseline=FILE"),
        (
            [LETTERS, "ppo.samples_per_prompt=2"],
            "Set reward.baseline=FILE (alignkit sample writes it), or data",
        ),
        ([LETTERS, "reward.baseline=nosuch.jsonl"], "reward.baseline: no file nosuch.jsonl"),
        (
            [LETTERS, "reward.baseline=prompts.jsonl"],
            "reward.baseline: prompts.jsonl line 1: the row needs a prompt",
        ),
        ([LETTERS, "reward.baseline=one.jsonl"], "one.jsonl has no answer to 4 of 4 prompts. The first: 'What is"),
    ],
)
def test_what_cannot_work_is_refused_by_check(
    judges: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("one.jsonl").write_text(json.dumps({"prompt": "another", "responses": ["e"]}))

    assert main(["check", "--plugin", "ppo", *SMALL, *judges, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_plugin_whose_judge_no_reward_asks_is_not_used(judges: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--plugin", "ppo", *SMALL, *GOLD, "--plugin", "tests"]) == 2
    error = capsys.readouterr().err
    assert "plugin tests (alignkit-tests 0.1) is not used. It provides judge first, judge right, " in error
    assert "Select one, such as reward.judge.name=first" in error


def test_the_reward_does_not_score_outside_training(judges: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--by", "judge", "-p", "tests", f"{LETTERS}", "-o", "ranked.jsonl"]

    assert main(["rank", "baseline.jsonl", *arguments]) == 2
    assert (
        "reward 'judge' works only in training. To rank answers, name the judge: --by NAME" in capsys.readouterr().err
    )
