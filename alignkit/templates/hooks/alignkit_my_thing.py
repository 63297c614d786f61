"""Run hooks: record every finished run in ``notes.jsonl`` beside the run folders."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from alignkit import Result, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback


@hookimpl
def alignkit_run_start(run: Run) -> None:
    """Called before the model is loaded. To stop the run with a one-line error, raise an ``AlignkitError``."""
    run.say(f"my-thing: {len(run.train_rows)} rows to train on, {len(run.eval_rows)} held out")


@hookimpl
def alignkit_model_ready(run: Run, role: str, model: nn.Module) -> None:
    """Called once for each model, after the tuner. A change to the model must be made in place."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run.say(f"my-thing: {trainable:,} trainable parameters in the {role}")


@hookimpl
def alignkit_callbacks(run: Run) -> list[TrainerCallback]:
    """Return callbacks of Transformers, which are called during training."""
    from transformers import TrainerCallback

    class Checkpoints(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            run.say(f"my-thing: checkpoint at step {state.global_step}")

    return [Checkpoints()]


@hookimpl
def alignkit_run_end(run: Run, result: Result) -> None:
    """Called when the run folder is complete. With several processes, each calls the hooks; only the first writes."""
    if os.environ.get("RANK", "0") == "0":
        note = {"run": str(result.folder), "seconds": round(result.seconds, 1), **result.metrics}
        with (result.folder.parent / "notes.jsonl").open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(note) + "\n")
