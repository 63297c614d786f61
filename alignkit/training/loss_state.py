"""Losses with a state: it is saved in checkpoints, and evaluation does not change it.

A loss is a function. A loss with a state, such as a running mean, is an object with ``__call__``, ``state_dict`` and
``load_state_dict``, like a module or an optimizer of PyTorch. The state is a flat dictionary of tensors and numbers,
the same on every process. Tensors are loaded on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers

from alignkit.models.transformers_internals import ExportableState


def has_state(loss: Any) -> bool:
    """Whether a loss has a state."""
    return hasattr(loss, "state_dict") and hasattr(loss, "load_state_dict")


def unchanged_by_evaluation(loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``loss``, with its state restored after a call without gradients."""
    stateful: Any = loss

    def call(batch: Any) -> Any:
        if torch.is_grad_enabled():
            return loss(batch)
        before = copy.deepcopy(stateful.state_dict())
        try:
            return loss(batch)
        finally:
            stateful.load_state_dict(before)

    return call


class LossState(transformers.TrainerCallback, ExportableState):
    """Saves the state of a loss in ``trainer_state.json``, the last file that the Trainer writes of a checkpoint."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def state(self) -> dict[str, Any]:
        """The state to save. The Trainer calls this for every checkpoint."""
        return {"args": {}, "attributes": {name: _to_json(value) for name, value in self.loss.state_dict().items()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if saved := state.stateful_callbacks.get(type(self).__name__):
            self.loss.load_state_dict({name: _from_json(value) for name, value in saved["attributes"].items()})


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value
