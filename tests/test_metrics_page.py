"""The page on metrics has every name that a stage logs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from alignkit.registry import checks

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
ONLINE = ("batch_size=4", "minibatches=1", "response_length=6", "iterations=1")


def listed() -> set[str]:
    """The names in the first column of the page's tables, with ``x_error`` for each held-out ``x``."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    return names | {f"{name}_error" for name in names if name.startswith("eval_")}


def test_a_loss_may_log_no_metric_that_the_trainer_or_a_stage_measures() -> None:
    of_losses = {"policy_loss", "value_loss", "ratio", "clip_fraction", "approx_kl"}

    assert {name for name in listed() if not checks.is_logged(name)} == of_losses


def test_every_metric_that_a_stage_logs_is_on_the_page(run_stage: Callable[..., Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"It rained for {n} days."}) + "\n" for n in range(4)))
    ptx = ("ppo.ptx_coef=0.1", f"ppo.ptx_data={texts}", "ppo.ptx_batch_size=2", "reward.on_error=skip")
    lora = ("--plugin", "lora", "train.max_steps=2", "train.logging_steps=1")
    ppo = run_stage("ppo", *lora, *ptx, *(f"ppo.{setting}" for setting in ONLINE))
    grpo = run_stage("grpo", *lora, *(f"grpo.{setting}" for setting in ONLINE), "grpo.samples_per_prompt=2")
    pairs = [run_stage(stage, *lora, f"{stage}.response_length=4") for stage in ("dpo", "kto", "rahf")]

    for run in (ppo.parent / "sft", ppo.parent / "rm", ppo, grpo, *pairs):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert set().union(*rows) - listed() - {"step"} == set(), run.name
