"""What a run cost so far, over all its sessions: its duration, and the peak memory of the GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from alignkit.models.transformers_internals import ExportableState


class Costs(transformers.TrainerCallback, ExportableState):
    """Saves them with each checkpoint, and adds up those of the sessions that led to it.

    Args:
        device: where the run trains.
        started: ``time.monotonic()`` when this session began.
    """

    def __init__(self, device: torch.device, started: float) -> None:
        self.device, self.started = device, started
        self.seconds_before = 0.0  # of the sessions before this one, up to their checkpoints
        self.peak_before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def seconds(self) -> float:
        """The duration so far. What followed the last checkpoint of an interrupted session does not count."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def peak_memory(self) -> int | None:
        """The largest number of bytes that tensors took on a GPU at the same time. None on other devices."""
        if self.device.type != "cuda":
            return self.peak_before
        return max(torch.cuda.max_memory_allocated(self.device), self.peak_before or 0)

    def state(self) -> dict[str, Any]:
        """The values to save. The Trainer calls this for every checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds, "peak_memory": self.peak_memory}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and (saved := state.stateful_callbacks.get(type(self).__name__)):
            self.seconds_before, self.peak_before = saved["attributes"]["seconds"], saved["attributes"]["peak_memory"]
        state.stateful_callbacks[type(self).__name__] = self.state()  # checkpoints of earlier versions lack it
