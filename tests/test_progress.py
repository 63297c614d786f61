"""The lines that a run prints while it trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.training.callbacks import Progress


def test_the_speed_leaves_out_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("alignkit.training.callbacks.time", SimpleNamespace(monotonic=lambda: now))
    component = SimpleNamespace(name="sft", watch=())
    run: Any = SimpleNamespace(config=SimpleNamespace(stage=SimpleNamespace(component=component)))
    state: Any = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True, log_history=[])
    args: Any = SimpleNamespace()
    progress = Progress(run)

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
