"""Metrics between two logs: weighted means, totals, and the values of every row of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Means:
    """Weighted means and totals since the last log, over all microbatches and processes.

    :meth:`add` and :meth:`count` keep sums on the device: they neither wait for it nor talk to other processes.
    :meth:`take` does both, so every process must call it at the same step.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}  # [2]: weighted sum of the values, sum of the weights
        self.totals: dict[str, Tensor] = {}  # scalars

    def add(self, values: Mapping[str, Tensor | float], weight: Tensor | float = 1.0) -> None:
        """Add scalars that are means over part of a step.

        ``weight`` is the size of that part, such as its number of tokens; a part of size 0 does not count, even if a
        value is NaN. A metric that is not added every time is a mean over the times when it was.
        """
        import torch

        size = self._scalar(weight)
        for name, value in values.items():
            added = torch.stack([torch.where(size > 0, self._scalar(value) * size, 0), size])
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def count(self, **totals: Tensor | float) -> None:
        """Add scalars that are summed up, such as numbers of tokens."""
        for name, value in totals.items():
            added = self._scalar(value)
            self.totals[name] = self.totals[name] + added if name in self.totals else added

    def take(self) -> dict[str, float]:
        """Return the means and totals since the last call, the same on every process, and start again at zero."""
        means, totals = self._reduced(self.sums, 2), self._reduced(self.totals, 1)
        self.sums.clear()
        self.totals.clear()
        return {name: total / weight for name, (total, weight) in means.items() if weight} | {
            name: total for name, (total,) in totals.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """This process's sums since the last log, as JSON."""
        return {
            "sums": {name: value.tolist() for name, value in self.sums.items()},
            "totals": {name: value.tolist() for name, value in self.totals.items()},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from the sums of :meth:`state_dict`."""
        import torch

        like = self._scalar(0.0)
        self.sums = {
            name: torch.tensor(value, dtype=like.dtype, device=like.device) for name, value in state["sums"].items()
        }
        self.totals = {name: self._scalar(value) for name, value in state["totals"].items()}

    def _reduced(self, sums: Mapping[str, Tensor], width: int) -> dict[str, list[float]]:
        """Sums over processes. A loss may return a metric on one process only."""
        import torch

        names = list(sums)
        if (processes := self.accelerator.num_processes) > 1:
            gathered: list[Any] = [None] * processes
            torch.distributed.all_gather_object(gathered, names)
            names = sorted(set().union(*gathered))
        if not names:
            return {}
        zero = self._scalar(0.0)
        local = torch.stack([sums.get(name, zero).expand(width) for name in names])
        return dict(zip(names, self.accelerator.reduce(local).tolist(), strict=True))

    def _scalar(self, value: Tensor | float) -> Tensor:
        import torch

        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no 64 bits
        if not isinstance(value, torch.Tensor):  # `full` does not wait for the device, as copying a number there would
            return torch.full((), float(value), device=device, dtype=dtype)
        return value.detach().to(device, dtype, non_blocking=True).reshape(())


class RowMetrics:
    """The metrics of every row of an evaluation, from all processes, each row once.

    Rows that only fill up the last batch so that every process has as many are left out.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.batches: list[Mapping[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a batch, [B] each. Every process must call it for each of its batches."""
        self.batches.append(self.accelerator.gather_for_metrics(dict(values)))

    def take(self) -> dict[str, Tensor]:
        """Return the values of all rows since the last call, [N] each on the CPU, and start again without any."""
        import torch

        batches, self.batches = self.batches, []
        return {name: torch.cat([batch[name] for batch in batches]).cpu() for name in (batches[0] if batches else ())}


def counted_rows(accelerator: Any, rows: int) -> int:
    """How many of the ``rows`` in a process's batch of an evaluation count: the first ones.

    The others are repeated, so that every process has as many. 0 if all are.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return int(min(max(state.remainder - accelerator.process_index * rows, 0), rows))


def last_logged(state: Any, name: str) -> float:
    """The value of a metric when it was last logged, or 0; ``state`` is a ``TrainerState``, which a resume restores."""
    logged = [log[name] for log in state.log_history if name in log]
    return float(logged[-1]) if logged else 0.0
