"""rank and compare score with reward runs and with the rewards of plugins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reward_runs import PROMPTS, TEXTS, answers_of, plain_scores, run_of, write

from alignkit import Answers
from alignkit.cli import main

ODD = """
from alignkit import Reward, hookimpl

@hookimpl
def alignkit_reward():
    return [
        Reward(name="brevity", summary="", build=lambda config, run: lambda answers: [-len(t) for t in answers.texts]),
        Reward(name="tokens", summary="", build=lambda config, run: lambda answers: [*map(len, answers.answer_ids)]),
        Reward(name="trainer", summary="", build=lambda config, run: run.tokenizer),
    ]
"""


def ranked(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int] | str:
    """The ranks of the answers to the first prompt, or the error."""
    write("samples.jsonl", [{"prompt": PROMPTS[0], "responses": TEXTS}])
    capsys.readouterr()
    if main(["rank", "samples.jsonl", "-o", "ranked.jsonl", *arguments]):
        return capsys.readouterr().err
    ranks: list[int] = json.loads(Path("ranked.jsonl").read_text())["ranks"]
    return ranks


def test_rank_takes_reward_runs_and_rewards(
    reward_runs: Path, capsys: pytest.CaptureFixture[str], install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.generation import rankings
    from alignkit.models import device_and_dtype

    install("odd", ODD)
    monkeypatch.setattr(device_and_dtype, "run_dtype", lambda train: torch.float32)
    run, _ = run_of("lora", "reward.path=lora-a/rm")
    answers = answers_of(run)
    one_prompt = Answers(answers.prompts[:1] * 8, TEXTS, answers.prompt_ids[:1] * 8, answers.answer_ids)
    by_a, by_b = (plain_scores(f"lora-{which}/rm", one_prompt) for which in "ab")

    assert ranked(capsys, "--by", "lora-a/rm") == rankings.ranks(by_a)
    worst = rankings.ranks([min(both) for both in zip(by_a, by_b, strict=True)])
    paths = "reward.paths=[lora-a/rm, lora-b/rm]"
    assert ranked(capsys, "--by", "ensemble", paths, "reward.by=min") == worst
    brevity = rankings.ranks([-len(text) for text in TEXTS])
    assert ranked(capsys, "--plugin", "odd", "--by", "brevity") == brevity
    parts = "reward.parts=[{name: brevity, weight: 2}]"
    assert ranked(capsys, "--plugin", "odd", "--by", "sum", parts) == brevity


def test_scores_that_are_not_finite_are_an_error_not_ranks_and_ties(
    reward_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.generation.scoring import RewardModel

    monkeypatch.setattr(RewardModel, "scores", lambda self, answers, batch: [1.0, *[math.nan] * (len(answers) - 1)])
    Path("infinite.py").write_text("def score(prompts, answers): return [1, *[float('inf')] * (len(answers) - 1)]\n")

    said = "the reward model in lora-a/rm returned nan for the answer 'b'"
    assert said in ranked(capsys, "--by", "lora-a/rm")
    assert said in ranked(capsys, "--by", "reward-model", "judge.path=lora-a/rm")
    by_function = ranked(capsys, "--by", "function", "judge.call=infinite:score")
    assert "infinite:score returned inf for the answer 'b'" in by_function
    compare = ["compare", "lora/sft", "full/sft", "--data", "prompts.jsonl", "--max-new-tokens", "4"]
    assert main([*compare, "--reward", "lora-a/rm"]) == 2
    assert "the reward model in lora-a/rm returned nan for the answer" in capsys.readouterr().err
    write("rows.jsonl", [{"prompt": "p", "completion": text} for text in "ab"])
    assert main(["score", "lora-a/rm", "rows.jsonl"]) == 2
    assert "the reward model in lora-a/rm returned nan for the answer 'b'" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_score_computes_in_the_number_format_of_the_run(
    reward_runs: Path, fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was trained in fp32, whatever format this machine computes fastest in."""
    from alignkit.models import device_and_dtype

    monkeypatch.setattr(device_and_dtype, "run_dtype", lambda train: torch.float32)
    run, _ = run_of("lora", "reward.path=lora-a/rm")
    answers = answers_of(run)
    monkeypatch.setattr(device_and_dtype, "run_dtype", lambda train: fast)
    rows = zip(PROMPTS, TEXTS, strict=False)
    write("pairs.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in rows])

    assert main(["score", "lora-a/rm", "pairs.jsonl", "-o", "scores.jsonl"]) == 0
    scores = [json.loads(line)["score"] for line in Path("scores.jsonl").read_text().splitlines()]
    assert scores == pytest.approx(plain_scores("lora-a/rm", answers), abs=2e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "reward-modle"], "Did you mean 'reward-model'"),
        (["--by", "ensemble"], "reward 'ensemble' needs a run of stage rm: add reward.path=RUN"),
        (["--by", "classifier", "reward.model=base"], "base is a language model"),
        (["--by", "classifier", "train.seed=1"], "unknown key train: the settings of --by classifier are reward.KEY"),
        (
            ["--by", "lora-a/rm", "reward.path=a"],
            "reward.path=a is a setting of a reward component, and --by lora-a/rm is not one",
        ),
        (["--by", "trainer"], "reward 'trainer' works only in training: it uses run.tokenizer"),
        (["--by", "tokens"], "this reward uses answer_ids, the tokens of a policy, but a file has only texts"),
        (["--by", "brevity", "reward.on_error=skip"], "reward.on_error is only for training"),
    ],
)
def test_what_cannot_score_outside_training_is_refused(
    reward_runs: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    install("odd", ODD)

    assert said in ranked(capsys, "--plugin", "odd", *arguments)


def test_compare_takes_rewards_of_plugins(
    reward_runs: Path, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    """A reward that reads tokens gets the policies'."""
    install("odd", ODD)
    given = ["compare", "lora/sft", "full/sft", "--data", "prompts.jsonl", "--max-new-tokens", "4", "-o", "table.jsonl"]

    assert main([*given, "--plugin", "odd", "--reward", "sum", "reward.parts=[{name: tokens, weight: 2}]"]) == 0
    rows = [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([2 * row["length"] for row in rows])
    assert main([*given, "--plugin", "odd"]) == 2
    assert "odd has no effect without --reward NAME" in capsys.readouterr().err
