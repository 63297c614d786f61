"""What a run logs after a resume from a checkpoint between two lines is what it would have logged without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import record

SETTINGS = (
    "data.eval_size=0",
    "train.bf16=false",
    "train.logging_steps=4",
    "train.lr_scheduler_type=constant",
    "train.learning_rate=0.01",
)
TIMING = ("_runtime", "_per_second", "total_flos")


def logged(run: Path, metric: str) -> list[dict[str, Any]]:
    """The lines with a metric, without times."""
    logs = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in log.items() if not name.endswith(TIMING)} for log in logs if metric in log]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto"])
def test_the_first_line_after_a_resume_has_all_steps_since_the_last_one(
    stage: str, run_stage: Callable[..., Path], tmp_path: Path
) -> None:
    settings = (*SETTINGS, *(() if stage == "sft" else (f"{stage}.policy=base",)))
    whole = run_stage(stage, *settings, "train.max_steps=8", "--output", str(tmp_path / "whole"))
    run_stage(stage, *settings, "train.max_steps=3")
    resumed = run_stage(stage, *settings, "train.max_steps=8", "--resume")

    lines = logged(whole, "loss")
    assert [line["step"] for line in lines] == [4, 8]
    assert logged(resumed, "loss") == lines
    assert record(resumed)["metrics"] == record(whole)["metrics"]
    (summary,) = logged(resumed, "train_loss")  # of the last five steps
    assert summary["train_loss"] < max(line["loss"] for line in lines)


def test_a_checkpoint_without_what_was_not_logged_can_be_resumed(run_stage: Callable[..., Path]) -> None:
    """Earlier versions did not save it."""
    run = run_stage("sft", *SETTINGS, "train.max_steps=3")
    file = run / "checkpoints/checkpoint-3/trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["Unlogged"]
    file.write_text(json.dumps(state))
    run_stage("sft", *SETTINGS, "train.max_steps=8", "--resume")

    assert [line["step"] for line in logged(run, "loss")] == [4, 8]


def test_the_duration_is_that_of_all_sessions(run_stage: Callable[..., Path]) -> None:
    run = run_stage("sft", *SETTINGS, "train.max_steps=1")
    first = record(run)["seconds"]
    file = run / "checkpoints/checkpoint-1/trainer_state.json"
    state = json.loads(file.read_text())
    saved = state["stateful_callbacks"]["Costs"]["attributes"]
    assert 0 < saved["seconds"] <= first + 0.1
    saved.update(seconds=1000.0, peak_memory=7 << 40)
    file.write_text(json.dumps(state))
    run_stage("sft", *SETTINGS, "train.max_steps=2", "--resume")
    assert 1000 < record(run)["seconds"] < 1300
    assert record(run)["peak_memory"] == 7 << 40

    file = run / "checkpoints/checkpoint-2/trainer_state.json"
    state = json.loads(file.read_text())
    assert 1000 < state["stateful_callbacks"]["Costs"]["attributes"]["seconds"] <= record(run)["seconds"] + 0.1
    del state["stateful_callbacks"]["Costs"]
    file.write_text(json.dumps(state))
    run_stage("sft", *SETTINGS, "train.max_steps=3", "--resume")
    assert 0 < record(run)["seconds"] < 300
