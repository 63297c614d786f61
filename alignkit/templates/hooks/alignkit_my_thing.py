"""Run hooks: a note on every run that is finished, in ``notes.jsonl`` beside the run folders."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from alignkit import hookimpl

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from alignkit.training.run import Result, Run


@hookimpl
def alignkit_run_start(run: Run) -> None:
    """Before the model is loaded: raise an ``AlignkitError`` here to stop the run with one line."""
    run.say(f"my-thing: {len(run.train_rows)} rows to train on, {len(run.eval_rows)} held out")


@hookimpl
def alignkit_model_ready(run: Run, role: str, model: nn.Module) -> None:
    """Once for each model, after the tuner; change the model in place, if at all."""
    trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    run.say(f"my-thing: {trained:,} weights of the {role} are trained")


@hookimpl
def alignkit_callbacks(run: Run) -> list[TrainerCallback]:
    """What happens during training is a callback of Transformers."""
    from transformers import TrainerCallback

    class Checkpoints(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            run.say(f"my-thing: checkpoint at step {state.global_step}")

    return [Checkpoints()]


@hookimpl
def alignkit_run_end(run: Run, result: Result) -> None:
    """The run folder is complete. Under accelerate the hooks are called in every process; one of them writes."""
    if os.environ.get("RANK", "0") == "0":
        note = {"run": str(result.folder), "seconds": round(result.seconds, 1), **result.metrics}
        with (result.folder.parent / "notes.jsonl").open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(note) + "\n")
