"""Deletes old checkpoints, as ``train.save_total_limit`` says.

The Trainer orders checkpoints by the clock, and deletes one file after another. If the clock is set back, it would
delete the newest one. A process that is killed would leave a part of one, which looks newer than it is. Here, the order
is that of the steps, and a checkpoint disappears at once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.runs.resume import checkpoints


class OldCheckpoints(TrainerCallback):
    """Keeps the newest checkpoints, and the best one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_save(args, state, control)  # a resumed run may have been stopped before it deleted one

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save or args.output_dir is None:
            return
        existing = checkpoints(Path(args.output_dir).parent)
        kept = {each.name for each in existing[-1:]} | {Path(state.best_model_checkpoint or "").name}
        others = [each for each in existing if each.name not in kept]
        surplus = len(existing) - max(self.limit, len(existing) - len(others))
        for each in others[: max(surplus, 0)]:
            removed = each.with_name(f".{each.name}")
            shutil.rmtree(removed, ignore_errors=True)
            each.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def delete_by_step(trainer: transformers.Trainer) -> None:
    """Delete the old checkpoints of a trainer here, and not in the Trainer."""
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    if limit is not None and limit > 0:
        trainer.add_callback(OldCheckpoints(limit))
