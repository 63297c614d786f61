"""The moving average of the policy's weights (step 11).

It is kept in fp32, whatever the weights are in: at a decay of 0.992, bf16 drops every update below half a percent of
the average.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def start(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The average before the first step: the weights themselves, in fp32."""
    return {name: weight.detach().float().clone() for name, weight in weights}


def update(average: dict[str, Tensor], weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
    """``average = decay * average + (1 - decay) * weights``, in place."""
    for name, weight in weights:
        average[name].lerp_(weight.detach().float(), 1 - decay)
