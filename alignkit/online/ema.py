"""The moving average of the policy's weights (step 11).

It is kept in fp32, whatever the weights are in: at a decay of 0.992, bf16 drops every update below half a percent of
the average.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from torch import Tensor


def start(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The average before the first step: the weights themselves, in fp32."""
    return {name: weight.detach().float().clone() for name, weight in weights}


def update(average: dict[str, Tensor], weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
    """``average = decay * average + (1 - decay) * weights``, in place."""
    for name, weight in weights:
        average[name].lerp_(weight.detach().float(), 1 - decay)


class UpdateAverage(transformers.TrainerCallback):
    """Averages the policy's weights of an ``OnlineTrainer`` after each optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from alignkit.models import shard_like

        weights = dict(self.trainer.policy_weights())  # which may be sharded since the average was made
        average = self.trainer.average
        self.trainer.average = {name: shard_like(weights[name], tensor) for name, tensor in average.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if decay := self.trainer.config.ema:
            update(self.trainer.average, self.trainer.policy_weights(), decay)
