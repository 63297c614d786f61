"""Losses on :class:`alignkit.PolicyBatch` without a value function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from alignkit import LossOutput, PolicyBatch, option
from alignkit.online import clipped_surrogate, ratio_metrics, token_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReinforceConfig:
    """The ``loss`` table of ``reinforce``."""

    entropy_coef: Annotated[float, Ge(0)] = option(0.0, "weight of the entropy bonus")


@dataclass(frozen=True)
class ClipConfig(ReinforceConfig):
    """The ``loss`` table of ``grpo-clip``."""

    cliprange: Annotated[float, Gt(0)] = option(0.2, "the lower bound of the probability ratio is 1 - cliprange")
    cliprange_high: Annotated[float, Gt(0)] | None = option(
        None, "the upper bound of the probability ratio is 1 + cliprange_high; null: the same as cliprange"
    )


def grpo_clip(config: ClipConfig) -> Callable[[PolicyBatch], LossOutput]:
    """Clipped surrogate objective; a range that is wider above than below is DAPO's (arXiv 2503.14476)."""
    low, high = config.cliprange, config.cliprange_high or config.cliprange
    return lambda batch: _output(config, batch, clipped_surrogate(batch, low, high), low, high)


def reinforce(config: ReinforceConfig) -> Callable[[PolicyBatch], LossOutput]:
    """REINFORCE. Nothing is clipped: ``clip_fraction`` is the share of ratios outside of 0.8 to 1.2."""
    return lambda batch: _output(config, batch, -batch.advantages * batch.logps, 0.2, 0.2)


def _output(config: ReinforceConfig, batch: PolicyBatch, policy: Tensor, low: float, high: float) -> LossOutput:
    policy_loss = token_mean(batch, policy)
    loss = policy_loss - config.entropy_coef * token_mean(batch, batch.entropy)
    return LossOutput(loss, {"policy_loss": policy_loss.detach(), **ratio_metrics(batch, low, high)})
