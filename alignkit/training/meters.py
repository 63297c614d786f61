"""Means of what a stage measures in training, over microbatches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Means:
    """Weighted means of figures between two logs, over all processes.

    A figure is a mean over part of a batch, and its weight is the size of that part. :meth:`add` never waits for the
    device and never talks to other processes; :meth:`take` does both, so every process must call it at the same step.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}  # [2]: of weighted values, and of weights

    def add(self, figures: Mapping[str, Tensor | float], weight: Tensor | float = 1.0) -> None:
        """Take in some figures. One that is not given every time is a mean over the times when it is."""
        import torch

        for name, value in figures.items():
            both = torch.stack([self._wide(value) * self._wide(weight), self._wide(weight)])
            self.sums[name] = self.sums[name] + both if name in self.sums else both

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        import torch

        names = list(self.sums)
        if (processes := self.accelerator.num_processes) > 1:  # a loss may give a figure on one process alone
            given: list[Any] = [None] * processes
            torch.distributed.all_gather_object(given, names)
            names = sorted(set().union(*given))
        if not names:
            return {}
        none = self._wide(torch.zeros(2))
        totals = self.accelerator.reduce(torch.stack([self.sums.get(name, none) for name in names]))
        self.sums.clear()
        return {name: total / weight for name, (total, weight) in zip(names, totals.tolist(), strict=True) if weight}

    def _wide(self, value: Tensor | float) -> Tensor:
        import torch

        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no 64 bits
        return torch.as_tensor(value).detach().to(device, dtype)
