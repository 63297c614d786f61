"""What a loss measures is logged as a mean over all microbatches and processes of a step, in every stage."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Waits, on_two_processes

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
        import alignkit_dpo, alignkit_kto, alignkit_ppo, alignkit_rm, alignkit_sft

        stages = (alignkit_dpo, alignkit_kto, alignkit_ppo, alignkit_rm, alignkit_sft)
        return [same(loss) for stage in stages for loss in stage.alignkit_loss()]
"""
BASE: dict[str, list[str]] = {
    "sft": [],
    "rm": ["rm.policy=base"],
    "dpo": ["dpo.policy=base", "dpo.eval_prompts=0"],  # answers depend on how they are batched
    "kto": ["kto.policy=base", "kto.eval_prompts=0"],
    "ppo": ["ppo.policy=base"],
}
LOSSES = {"sft": "nll", "rm": "bradley-terry", "dpo": "sigmoid", "kto": "kto", "ppo": "ppo-clip"}
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
    folder = run_stage(stage, "--plugin", "same", *BASE[stage], *settings, f"loss.name=same-{LOSSES[stage]}")

    assert len(steps(folder)) == 2
    for step in steps(folder):
        assert step["same"] == pytest.approx(step["loss"], rel=1e-4)


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_unequal_microbatches_log_what_one_batch_logs(
    run_stage: Callable[..., Path], install: Callable[..., None], stage: str
) -> None:
    """12 rows in one batch, or in microbatches of 5, 5 and 2; held-out rows in one batch, or in batches of 3."""
    install("same", SAME)
    settings = ["--plugin", "same", f"loss.name=same-{LOSSES[stage]}", "data.eval_size=4", "train.max_steps=1"]
    settings += ["train.bf16=false", *BASE[stage]]
    sizes = "train.per_device_train_batch_size={}", "train.per_device_eval_batch_size={}"
    pairs = 2 if stage == "dpo" else 1  # of a row
    whole = run_stage(stage, *settings, *(size.format(12 * pairs) for size in sizes))
    accumulate = ["train.gradient_accumulation_steps=3", "--output", str(whole.parent.parent / "parts")]
    parts = run_stage(stage, *settings, *accumulate, sizes[0].format(5 * pairs), sizes[1].format(3))

    (one,), (three,) = steps(whole), steps(parts)
    assert {"same", "loss"} <= one.keys()
    for name in one.keys() - {"num_tokens"}:  # in a batch of DPO, pairs with the same answer share its tokens
        assert three[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    if stage == "sft":
        assert three["num_tokens"] == one["num_tokens"]
    held_out = [json.loads((folder / "alignkit.json").read_text())["metrics"] for folder in (whole, parts)]
    measured = [n for n in held_out[0] if "eval_" in n and not re.search("runtime|per_second", n)]
    assert len(measured) > 4
    for name in measured:
        assert held_out[1][name] == pytest.approx(held_out[0][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto"])
def test_a_step_never_waits_for_the_device(
    run_stage: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Reading a value of a tensor inside of a step would. Losses are built-in ones; the libraries' waits are theirs."""
    (cls,) = (
        each
        for each in vars(importlib.import_module(f"alignkit_{stage}.trainer")).values()
        if isinstance(each, type) and each.__module__ == f"alignkit_{stage}.trainer" and hasattr(each, "compute_loss")
    )
    compute_loss, waits = cls.compute_loss, Waits()

    def watched(self: Any, model: Any, *arguments: Any, **keywords: Any) -> Any:
        if not model.training:
            return compute_loss(self, model, *arguments, **keywords)
        with waits:
            return compute_loss(self, model, *arguments, **keywords)

    monkeypatch.setattr(cls, "compute_loss", watched)
    run_stage(stage, *BASE[stage])

    assert waits.places == []


COUNT = """
    from alignkit import Reward, hookimpl

    @hookimpl
    def alignkit_reward():
        return [Reward(name="count", summary="", build=lambda config, run: count)]

    def count(answers):
        return [len(text) for text in answers.texts]
"""


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_two_processes_log_what_one_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_stage: Callable[..., Path], tiny_model: Callable[..., Path],
    tiny_data: Callable[[str], Path], install: Callable[..., None], stage: str,
) -> None:  # fmt: skip
    """Five held-out rows do not fill two processes' batches of two. PPO's figures are in ``test_ppo.py``."""
    install("same", SAME)
    monkeypatch.chdir(tmp_path)
    settings = ["--plugin", "same", f"loss.name=same-{LOSSES[stage]}", "train.logging_steps=1", "data.eval_size=5"]
    settings += ["train.bf16=false", "train.max_steps=2", *BASE[stage]]
    settings += ["train.gradient_accumulation_steps=2"]
    one = run_stage(stage, *settings, "train.per_device_train_batch_size=2")
    data = tiny_data("demonstrations" if stage == "sft" else "rankings")
    settings += ["--model", str(tiny_model()), "--data", str(data), "--output", "two", "train.use_cpu=true"]
    settings += ["train.per_device_train_batch_size=1", "train.per_device_eval_batch_size=2"]
    done = on_two_processes("train", "--plugin", stage, *settings)
    assert done.returncode == 0, done.stderr

    two = tmp_path / "two" / stage
    manifests = [json.loads((folder / "alignkit.json").read_text()) for folder in (one, two)]
    assert manifests[1]["processes"] == 2
    held_out = "eval_perplexity" if stage == "sft" else "eval_accuracy"
    assert manifests[0]["metrics"][held_out] == pytest.approx(manifests[1]["metrics"][held_out], rel=1e-5)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert b["same"] == pytest.approx(b["loss"], rel=1e-5)
        for name in a.keys() - {"num_tokens"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
        if stage == "sft":
            assert a["num_tokens"] == b["num_tokens"]
