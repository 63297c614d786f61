"""Keeps what was not logged yet at a checkpoint, so that a resumed run logs the same as an uninterrupted one.

A line has means over the steps since the line before, and a checkpoint may lie between the two.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from accelerate.utils import gather_object  # type: ignore[import-untyped]

from alignkit.models.transformers_internals import ExportableState, restore_unlogged_loss, unlogged_loss
from alignkit.training.meters import Means


def keep(trainer: Any) -> None:
    """Make a trainer save the loss and its :class:`Means` since the last log, and go on from them after a resume."""
    unlogged, save_model = Unlogged(trainer), trainer.save_model

    @functools.wraps(save_model)
    def gather_and_save(*args: Any, **kwargs: Any) -> None:
        unlogged.gather()
        save_model(*args, **kwargs)

    trainer.save_model = gather_and_save  # every process calls it, before one of them writes the state
    trainer.add_callback(unlogged)


def unlogged_total(state: Any, name: str) -> float:
    """What was counted under a name since the last log when the checkpoint of a resumed ``TrainerState`` was saved."""
    means = [each for process in _processes(state) for each in process["means"].values()]
    return float(sum(each["totals"].get(name, 0.0) for each in means))


class Unlogged(transformers.TrainerCallback, ExportableState):
    """Saves what each process has not logged in ``trainer_state.json``, the last file of a checkpoint."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.processes: list[dict[str, Any]] = []

    def gather(self) -> None:
        """Collect it from all processes."""
        loss, step = unlogged_loss(self.trainer)
        means = {name: each.state_dict() for name, each in self._means().items()}
        self.processes = gather_object([{"loss": loss, "step": step, "means": means}])

    def state(self) -> dict[str, Any]:
        """The values to save. The Trainer calls this for every checkpoint."""
        return {"args": {}, "attributes": {"processes": self.processes}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # earlier versions lack it
        if processes := _processes(state):
            own = processes[args.process_index]
            mean = sum(each["loss"] for each in processes) / len(processes)
            restore_unlogged_loss(self.trainer, own["loss"], own["step"], mean)
            for name, means in self._means().items():
                means.load_state_dict(own["means"][name])

    def _means(self) -> dict[str, Means]:
        return {name: value for name, value in vars(self.trainer).items() if isinstance(value, Means)}


def _processes(state: Any) -> list[dict[str, Any]]:
    saved = state.stateful_callbacks.get(Unlogged.__name__)
    return list(saved["attributes"]["processes"]) if saved else []
