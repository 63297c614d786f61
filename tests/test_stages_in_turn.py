"""Several stages in one command: what one of them held in memory is gone when the next one loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

WATCH = """
    import gc, os, weakref
    from alignkit import hookimpl

    alive = []

    @hookimpl
    def alignkit_load_model(run, role, name_or_path, kwargs):
        others = [what for stage, what, ref in alive if stage != run.config.stage.component.name and ref() is not None]
        with open(os.environ["ALIVE"], "a") as file:
            file.write(f"{run.config.stage.component.name}: {' '.join(others)}\\n")

    @hookimpl
    def alignkit_callbacks(run):
        from transformers import TrainerCallback

        class Watch(TrainerCallback):
            def on_train_end(self, args, state, control, model, optimizer, train_dataloader, **kwargs):
                stage = run.config.stage.component.name
                alive.extend((stage, name, weakref.ref(p)) for name, p in model.named_parameters())
                alive.append((stage, "optimizer", weakref.ref(getattr(optimizer, "optimizer", optimizer))))
                alive.append((stage, "run", weakref.ref(run)))
                for each in gc.get_objects():
                    if type(each).__name__.endswith("Trainer") and hasattr(each, "accelerator"):
                        alive.append((stage, type(each).__name__, weakref.ref(each)))

        return [Watch()]
"""


def test_models_trainer_and_optimizer_of_a_stage_are_gone_before_the_next_one_loads(
    run_stage: Callable[..., Path],
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    install("watch", WATCH)
    monkeypatch.setenv("ALIVE", str(tmp_path / "alive.txt"))
    ppo = ("ppo.iterations=1", "ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=6")
    run_stage("ppo", "--plugin", "watch", *ppo)

    loads = Path(os.environ["ALIVE"]).read_text().splitlines()
    assert {line.split(":")[0] for line in loads} == {"sft", "rm", "ppo"}
    assert [line for line in loads if not line.endswith(": ")] == []
