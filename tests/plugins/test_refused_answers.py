"""Answers that a reward refuses are left out of the update, or stop the run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_runs import TEXTS, answers_of, run_of

from alignkit.cli import main

PICKY = """
def letters(prompts, answers):
    if any('e' in answer for answer in answers):
        raise ValueError('no e, please')
    return [float(len(answer)) for answer in answers]

def relative(prompts, answers):  # to the rest of the batch
    scores = letters(prompts, answers)
    return [score - sum(scores) / len(scores) for score in scores]

def other(prompts, answers):
    return [1000.0 if 'e' in answer else float(len(answer)) for answer in answers]

def none(prompts, answers):
    raise ValueError('never')
"""

PICKED = [
    *("--plugin", "lora", "--model", "base", "--data", "prompts.jsonl", "ppo.policy=lora/sft", "train.use_cpu=true"),
    *("train.bf16=false", "ppo.batch_size=8", "ppo.minibatches=2", "ppo.response_length=6", "data.eval_size=2"),
    *("train.per_device_train_batch_size=2", "train.learning_rate=1e-3", "reward.name=function"),
]


def picked(output: str, call: str, *settings: str) -> int:
    given = [*PICKED, "--output", output, f"reward.call=picky:{call}", *settings]
    return main(["train", "--plugin", "ppo", *given])


def test_refused_answers_are_found_one_by_one_and_the_rest_is_scored_together(reward_runs: Path) -> None:
    Path("picky.py").write_text(PICKY)
    run, score = run_of("lora", "reward.name=function", "reward.call=picky:relative", "reward.on_error=skip")
    kept = [len(text) for text in TEXTS if "e" not in text]
    mean = statistics.fmean(kept)

    scores = score(answers_of(run))
    assert [s for s in scores if s == s] == pytest.approx([length - mean for length in kept])
    assert [s != s for s in scores] == ["e" in text for text in TEXTS]


def test_a_run_goes_on_after_an_answer_that_its_reward_refuses(
    reward_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The setting may be added on --resume. A skipped answer has no part: whatever it would score, nothing changes."""
    Path("picky.py").write_text(PICKY)
    assert picked("cut", "letters", "ppo.iterations=1") == 2
    assert "failed on the answer" in capsys.readouterr().err
    assert picked("cut", "letters", "ppo.iterations=1", "reward.on_error=skip", "--resume") == 0
    assert "skipped an answer, and will skip others like it: reward 'function' failed on" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("cut/ppo/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "reward_errors" in line]

    assert 0 < line["reward_errors"] < 8
    rows = [json.loads(row) for row in Path("cut/ppo/answers.jsonl").read_text().splitlines()]
    assert all((row["score"] is None) == ("e" in row["answer"]) for row in rows)
    assert picked("none", "none", "ppo.iterations=1", "reward.on_error=skip") == 2


def test_a_skipped_answer_has_no_part_in_the_update(reward_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the answers that are kept, worked out from their tokens alone."""
    from alignkit_ppo import trainer as ppo_trainer

    Path("picky.py").write_text(PICKY)
    seen: list[tuple[Any, float]] = []
    compute = ppo_trainer.PPOTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        seen.append((inputs, float(kwargs["num_items_in_batch"])))
        return loss

    monkeypatch.setattr(ppo_trainer.PPOTrainer, "compute_loss", watched)
    assert picked("skip", "letters", "ppo.iterations=1", "reward.on_error=skip") == 0
    steps = [seen[:2], seen[2:]]  # of two microbatches each
    kept = [batch["mask"].any(1) for batch, _ in seen]

    assert 0 < sum(int(of.sum()) for of in kept) < 8
    for step in steps:
        assert {tokens for _, tokens in step} == {max(1, sum(int(batch["mask"].sum()) for batch, _ in step))}
    advantages = torch.cat([batch["advantages"][batch["mask"]] for batch, _ in seen])
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)  # whitened over the kept tokens alone
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)
