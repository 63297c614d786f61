"""What a loss measures is logged as a mean over all microbatches and processes of a step, in every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import on_two_processes

# of each stage a loss with a metric that is the loss itself: reduced the same way, it must be logged as the same number
SAME = """
    import dataclasses

    from alignkit import Loss, LossOutput, hookimpl

    def same(loss):
        def build(config):
            inner = loss.build(loss.config())

            def measured(batch):
                output = inner(batch)
                return LossOutput(output.loss, {"same": output.loss.detach()})
            return measured
        return dataclasses.replace(loss, name=f"same-{loss.name}", config=type(loss.config()), build=build)

    @hookimpl
    def alignkit_loss():
        import alignkit_dpo, alignkit_ppo, alignkit_rm, alignkit_sft

        stages = (alignkit_dpo, alignkit_ppo, alignkit_rm, alignkit_sft)
        return [same(loss) for stage in stages for loss in stage.alignkit_loss()]
"""
LOSSES = {"sft": "nll", "rm": "bradley-terry", "dpo": "sigmoid", "ppo": "ppo-clip"}
FEW = ("ppo.batch_size=8", "ppo.iterations=2", "ppo.minibatches=2", "ppo.response_length=8", "train.max_steps=4")


def steps(folder: Path) -> list[dict[str, Any]]:
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [log for log in logs if "loss" in log]


@pytest.mark.parametrize("stage", LOSSES)
def test_a_metric_that_is_the_loss_is_logged_as_the_loss(
    run_stage: Callable[..., Path], install: Callable[..., None], stage: str
) -> None:
    install("same", SAME)
    install("count", COUNT)
    settings = ["train.logging_steps=1", "train.gradient_accumulation_steps=2", "train.max_steps=2"]
    if stage == "ppo":
        settings = [*FEW, "--plugin", "count"]
    where = [] if stage == "sft" else [f"{stage}.policy=base"]
    folder = run_stage(stage, "--plugin", "same", *where, *settings, f"loss.name=same-{LOSSES[stage]}")

    assert len(steps(folder)) == 2
    for step in steps(folder):
        assert step["same"] == pytest.approx(step["loss"], rel=1e-4)


COUNT = """
    from alignkit import Reward, hookimpl

    @hookimpl
    def alignkit_reward():
        return [Reward(name="count", summary="", build=lambda config, run: count)]

    def count(answers):
        return [len(text) for text in answers.texts]
"""


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_two_processes_log_what_one_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_stage: Callable[..., Path], tiny_model: Callable[..., Path],
    tiny_data: Callable[[str], Path], install: Callable[..., None], stage: str,
) -> None:  # fmt: skip
    """Five held-out rows do not fill two processes' batches of two. PPO's figures are in ``test_ppo.py``."""
    install("same", SAME)
    monkeypatch.chdir(tmp_path)
    settings = ["--plugin", "same", f"loss.name=same-{LOSSES[stage]}", "train.logging_steps=1", "data.eval_size=5"]
    settings += ["train.bf16=false", "train.max_steps=2", *(["rm.policy=base"] if stage == "rm" else [])]
    one = run_stage(stage, *settings, "train.per_device_train_batch_size=4")
    data = tiny_data("rankings" if stage == "rm" else "demonstrations")
    settings += ["--model", str(tiny_model()), "--data", str(data), "--output", "two", "train.use_cpu=true"]
    settings += ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=2"]
    done = on_two_processes("train", "--plugin", stage, *settings)
    assert done.returncode == 0, done.stderr

    two = tmp_path / "two" / stage
    manifests = [json.loads((folder / "alignkit.json").read_text()) for folder in (one, two)]
    assert manifests[1]["processes"] == 2
    held_out = "eval_perplexity" if stage == "sft" else "eval_accuracy"
    assert manifests[0]["metrics"][held_out] == pytest.approx(manifests[1]["metrics"][held_out], rel=1e-5)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert b["same"] == pytest.approx(b["loss"], rel=1e-5)
        for name in ("loss", "same", "grad_norm", "learning_rate"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
