"""The advantages by hand, that the stage learns, and its exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alignkit_group_advantage import ClipConfig, group_clip
from alignkit_group_advantage.trainer import GroupTrainer, relative_scores
from safetensors.torch import load_file

from alignkit import PolicyBatch
from alignkit.online import Rollouts

ALL = torch.ones(4, dtype=torch.bool)
SMALL = [
    *("sft.train.max_steps=1", "train.max_steps=-1", "train.per_device_train_batch_size=8", "train.bf16=false"),
    *("train.learning_rate=0.1", "train.warmup_steps=0"),
]


def settings(**values: object) -> list[str]:
    """Arguments for a small run, with values of the ``group-advantage`` table."""
    small = {"reward.name": "function", "reward.call": "scores:share_of_e", "missing_eos_penalty": 0}
    small |= {"batch_size": 32, "minibatches": 2, "response_length": 6}
    return [*SMALL, *(f"group-advantage.{name}={value}" for name, value in {**small, **values}.items())]


@pytest.fixture(autouse=True)
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def share_of_e(prompts, answers):\n    return [10 * a.count('e') / (len(a) + 1) for a in answers]\n"
    (tmp_path / "scores.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_scores_are_relative_to_their_group() -> None:
    """Two of four right: the mean is 1/2, the unbiased deviation 0.577350, and (1 - 1/2) / 0.577450 is 0.865876."""
    scores = torch.tensor([1.0, 0, 0, 1, 3, 1, 1, 3])
    right, wrong = 0.865876, -0.865876
    expected = torch.tensor([right, wrong, wrong, right, 0.865951, -0.865951, -0.865951, 0.865951])

    torch.testing.assert_close(relative_scores(scores, ALL.repeat(2), 4, scale=True), expected)
    unscaled = torch.tensor([0.5, -0.5, -0.5, 0.5, 1, -1, -1, 1])
    torch.testing.assert_close(relative_scores(scores, ALL.repeat(2), 4, scale=False), unscaled)


def test_equal_scores_and_refused_answers_teach_nothing() -> None:
    assert not relative_scores(torch.full((4,), 0.7), ALL, 4, scale=True).any()
    kept = torch.tensor([True, True, False, False])
    torch.testing.assert_close(
        relative_scores(torch.tensor([2.0, 0, 99, 99]), kept, 4, scale=False), torch.tensor([1.0, -1, 0, 0])
    )


def test_the_kl_penalty_of_a_token_counts_up_to_its_answers_end() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollouts = Rollouts(
        prompts=[[1], [1]],
        answers=[[2, 2, 2], [2, 2]],
        scores=torch.tensor([3.0, 1.0]),
        kept=torch.tensor([True, True]),
        answer_mask=mask,
        logps=torch.tensor([[-1.0, -1, -1], [-1, -1, 0]]),
        ref_logps=torch.tensor([[-2.0, -1, -4], [-1, -3, 0]]),
        values=None,
        metrics={},
    )
    trainer: Any = SimpleNamespace(config=SimpleNamespace(samples_per_prompt=2, scale=False), kl_coef=0.1)
    estimates = GroupTrainer.estimate_advantages(trainer, rollouts)

    expected = torch.tensor([[1 - 0.4, 1 - 0.3, 1 - 0.3], [-1 - 0.2, -1 - 0.2, 0]])
    torch.testing.assert_close(estimates.advantages, expected)


def test_the_loss_by_hand() -> None:
    """Ratios 1.5, 0.5 and 1.1: the first two are clipped to 1.2 and 0.8."""
    batch = PolicyBatch(
        logps=torch.tensor([[1.5, 0.5, 1.1]]).log(),
        old_logps=torch.zeros(1, 3),
        advantages=torch.tensor([[1.0, -1, 2]]),
        entropy=torch.zeros(1, 3),
        mask=torch.ones(1, 3, dtype=torch.bool),
        num_tokens=3,
    )
    output = group_clip(ClipConfig())(batch)

    assert output.loss.item() == pytest.approx((-1.2 + 0.8 - 2.2) / 3)
    assert output.metrics["clip_fraction"] == pytest.approx(2 / 3)


def test_it_learns_without_a_value_function(run_stage: Callable[..., Path]) -> None:
    full = ["--plugin", "full", "train.learning_rate=0.003"]
    run = run_stage("group-advantage", *settings(iterations=20, kl_coef=0), *full)
    metrics = json.loads((run / "alignkit.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines if "score" in line]

    assert metrics["eval_score"] > metrics["first_eval_score"] + 0.5
    assert scores[-1] > scores[0] + 0.5
    assert not any("value_loss" in line or "explained_variance" in line for line in lines)


def test_a_run_that_was_cut_off_goes_on_exactly(
    run_stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(iterations=3, save_every=1, kl_target=0.5, ema=0.9)
    run = run_stage("group-advantage", *arguments)
    whole = load_file(run / "adapter_model.safetensors")
    unfinished = run.rename(run.with_name("group-advantage.unfinished"))
    (unfinished / "alignkit.json").unlink()
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-6")
    run_stage("group-advantage", *arguments, "--resume")
    resumed = load_file(run / "adapter_model.safetensors")

    assert "resuming from step 4" in capsys.readouterr().out
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_answer_per_prompt_is_refused(run_stage: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="samples_per_prompt: Input should be greater than or equal to 2"):
        run_stage("group-advantage", *settings(samples_per_prompt=1))


def test_the_plugin_passes_its_checks(check_plugin: Callable[[str], None]) -> None:
    check_plugin("group-advantage")
