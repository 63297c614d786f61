"""The weights by hand, the rows, and the stage under every built-in tuner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alignkit_reward_weighted import RewardWeightedConfig, ScoredLogps, reward_weighted, scored, weights
from safetensors.torch import load_file

from alignkit import DataError

USER = {"role": "user", "content": "Why?"}
SETTINGS = ["sft.train.max_steps=1", "train.learning_rate=0.01", "train.warmup_steps=0", "train.bf16=false"]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Arguments with scored answers of different lengths."""
    file = tmp_path / "scores.jsonl"
    rows = [{"prompt": f"Say {n}", "response": "good " * (n % 3 + 1), "score": n % 5 / 2} for n in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(file)]


def test_the_weights_by_hand() -> None:
    """exp(±1 / 2) are 1.648721 and 0.606531, whose mean is 1.127626."""
    scores = torch.tensor([3.0, 1.0])

    assert weights(RewardWeightedConfig(beta=2), scores, scores).tolist() == pytest.approx(
        [1.462117, 0.537883], abs=1e-5
    )
    clipped = weights(RewardWeightedConfig(beta=0.01, max_weight=4), scores, scores)
    assert clipped.tolist() == pytest.approx([2, 0], abs=1e-5)


def test_the_loss_by_hand() -> None:
    scores = torch.tensor([3.0, 1.0])
    batch = ScoredLogps(torch.tensor([-4.0, -10.0]), scores, scores, num_tokens=7)

    loss = reward_weighted(RewardWeightedConfig(beta=2))(batch).loss
    assert loss.item() == pytest.approx((1.462117 * 4 + 0.537883 * 10) / 7, abs=1e-5)


def test_what_alignkit_score_writes_is_read() -> None:
    (one,) = scored({"prompt": "Why?", "response": "So.", "score": -1})
    both = scored({"prompt": [USER], "responses": ["So.", "No."], "ranks": [0, 1], "scores": [2.5, 0]})

    assert (one.prompt, one.answer, one.score) == ([USER], "So.", -1.0)
    assert [(each.answer, each.score) for each in both] == [("So.", 2.5), ("No.", 0.0)]


@pytest.mark.parametrize("score", [None, "0.5", True, float("inf")])
def test_a_score_that_is_no_number_is_an_error(score: Any) -> None:
    with pytest.raises(DataError, match="must be a finite number"):
        scored({"prompt": "Why?", "response": "So.", "score": score})


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_it_learns_and_equal_scores_are_sft(
    run_stage: Callable[..., Path], data: list[str], tmp_path: Path, tuner: str
) -> None:
    """The held-out loss before training, with weights of 1, is that of SFT on the same answers."""
    rows = [{**json.loads(line), "score": 0.5} for line in Path(data[1]).read_text().splitlines()]
    equal = tmp_path / "equal.jsonl"
    equal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--plugin", tuner, "train.per_device_eval_batch_size=16", *SETTINGS[1:], "--data", str(equal)]
    folders = run_stage("reward-weighted", *settings, "reward-weighted.policy=base"), run_stage("sft", *settings)
    metrics = [json.loads((folder / "alignkit.json").read_text())["metrics"] for folder in folders]

    assert metrics[0]["first_eval_loss"] == pytest.approx(metrics[1]["first_eval_loss"], rel=1e-5)
    assert metrics[0]["eval_loss"] < metrics[0]["first_eval_loss"]


def test_a_run_that_was_cut_off_goes_on_exactly(
    run_stage: Callable[..., Path], data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SETTINGS, *data, "train.save_steps=1", "train.save_strategy=steps"]
    run = run_stage("reward-weighted", *settings)
    whole = load_file(run / "adapter_model.safetensors")
    cut = run.rename(run.with_name("reward-weighted.unfinished"))
    (cut / "alignkit.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-2")
    run_stage("reward-weighted", *settings, "--resume")
    resumed = load_file(run / "adapter_model.safetensors")

    assert "resuming from step 1" in capsys.readouterr().out
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_alignkit_finds_no_problem(check_plugin: Callable[[str], None]) -> None:
    check_plugin("reward-weighted")
