"""The lines that a run prints while it trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from alignkit.training.callbacks import Progress

COMPONENT = SimpleNamespace(name="sft", watch=())
RUN: Any = SimpleNamespace(config=SimpleNamespace(stage=SimpleNamespace(component=COMPONENT)))


def test_the_speed_leaves_out_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("alignkit.training.callbacks.time", SimpleNamespace(monotonic=lambda: now))
    args: Any = SimpleNamespace()
    state, progress = TrainerState(is_world_process_zero=True), Progress(RUN)

    def evaluate() -> None:
        nonlocal now
        now += 30.0
        progress.on_log(args, state, args, {"eval_loss": 1.0})

    progress.on_train_begin(args, state, args)
    evaluate()
    for step in range(1, 11):  # of 2 seconds and 100 tokens each
        now, state.global_step = now + 2.0, step
        progress.on_step_end(args, state, args)
        if step % 5 == 0:
            progress.on_log(args, state, args, {"loss": 1.0, "num_tokens": 100.0 * step})
        if step in (4, 5):
            evaluate()

    speeds = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert speeds == ["50 tokens/s", "50 tokens/s"]


def test_the_speed_after_a_resume_is_of_the_steps_since_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("alignkit.training.callbacks.time", SimpleNamespace(monotonic=lambda: now))
    args: Any = SimpleNamespace()
    means = {"means": {"sums": {}, "totals": {"num_tokens": 300.0}}}
    unlogged = {"attributes": {"processes": [{"means": means}]}}
    state, progress = TrainerState(is_world_process_zero=True, stateful_callbacks={"Unlogged": unlogged}), Progress(RUN)  # type: ignore[arg-type]
    state.log_history = [{"num_tokens": 1000.0}]
    progress.on_train_begin(args, state, args)
    now = 4.0
    progress.on_log(args, state, args, {"loss": 1.0, "num_tokens": 1500.0})

    assert capsys.readouterr().out.endswith("  50 tokens/s\n")
