"""A loss that gives more weight to tokens the model finds hard: the focal loss (arXiv 1708.02002)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from alignkit import Loss, LossOutput, TokenLogps, hookimpl, option


@dataclass(frozen=True)
class Config:
    """The ``loss`` table."""

    gamma: Annotated[float, Ge(0)] = option(2.0, "how strongly easy tokens are down-weighted; 0: not at all")


def build(config: Config) -> Callable[[TokenLogps], LossOutput]:
    """Return the loss, a function of the batches of a stage such as ``sft``."""

    def loss(batch: TokenLogps) -> LossOutput:
        weights = (1 - batch.logps.exp()) ** config.gamma  # [B, T]
        return LossOutput(-(weights * batch.logps * batch.mask).sum() / batch.num_tokens)

    return loss


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [Loss(name="my-thing", summary="hard tokens count more", batch=TokenLogps, config=Config, build=build)]
