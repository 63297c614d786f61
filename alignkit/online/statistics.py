"""Means, moments and whitening over the answers of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Statistics:
    """Statistics of tensors that are split over processes. Every process must call each method."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no 64 bits

    def total(self, values: Tensor) -> float:
        """The sum of a scalar tensor."""
        return float(self.accelerator.reduce(values.to(self.dtype)))

    def by_process(self, number: int) -> list[int]:
        """The number that each process has, by rank."""
        numbers: Tensor = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return numbers.tolist()

    def mean(self, values: Tensor, mask: Tensor | None = None) -> float:
        """The mean of ``values``, of those where ``mask`` (of the same shape) is True."""
        if mask is None:
            return float(self.accelerator.reduce(values.to(self.dtype).mean(), "mean"))
        return self.total((values * mask).sum()) / self.total(mask.sum())

    def moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The count, the sum and the sum of squares of masked values, each a scalar tensor."""
        chosen = values[mask].to(self.dtype)
        sums = (mask.sum().to(self.dtype), chosen.sum(), (chosen**2).sum())
        count, total, squares = (self.accelerator.reduce(each) for each in sums)
        return count, total, squares

    def variance(self, values: Tensor, mask: Tensor) -> float:
        """The population variance of masked values."""
        count, total, squares = self.moments(values, mask)
        return float(squares / count - (total / count) ** 2)

    def whiten(self, values: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
        """``values`` scaled to variance 1 over the mask, and to mean 0 if ``shift``; 0 outside of the mask."""
        count, total, squares = self.moments(values, mask)
        mean = total / count
        variance = squares / count - mean**2
        white = (values - mean) * (variance + 1e-8).rsqrt()
        return ((white if shift else white + mean) * mask).float()

    def explained_variance(self, values: Tensor, returns: Tensor, mask: Tensor) -> float:
        """1 - Var(returns - values) / Var(returns): 1 is a perfect value function, 0 one that knows only the mean."""
        spread = self.variance(returns, mask)
        return 1 - self.variance(returns - values, mask) / spread if spread > 0 else 0.0
