"""Losses on :class:`alignkit.PolicyBatch`: functions of outputs of policy and value function, now and when sampling."""

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
class ClipConfig:
    """The ``loss`` table of ``ppo-clip``."""

    cliprange: Annotated[float, Gt(0)] = option(
        0.2, "clip range of the probability ratio: 1 - cliprange to 1 + cliprange"
    )
    value_cliprange: Annotated[float, Gt(0)] = option(0.2, "clip range of a value around its old value")
    value_coef: Annotated[float, Ge(0)] = option(0.1, "weight of the value loss, if the stage has a value function")
    entropy_coef: Annotated[float, Ge(0)] = option(0.0, "weight of the entropy bonus")


@dataclass(frozen=True)
class DualClipConfig(ClipConfig):
    """The ``loss`` table of ``ppo-dual-clip``."""

    dual_clip: Annotated[float, Gt(1)] = option(
        3.0, "bounds the loss of a token with a negative advantage at this many times the advantage"
    )


def ppo_clip(config: ClipConfig) -> Callable[[PolicyBatch], LossOutput]:
    """Clipped surrogate objective (arXiv 1707.06347, eq. 7 and 9): mean over the response tokens of the step."""
    return lambda batch: _with_value(config, batch, clipped_surrogate(batch, config.cliprange, config.cliprange))


def ppo_dual_clip(config: DualClipConfig) -> Callable[[PolicyBatch], LossOutput]:
    """As :func:`ppo_clip`, bounded also where the advantage is negative and the ratio large (arXiv 1912.09729)."""

    def loss(batch: PolicyBatch) -> LossOutput:
        import torch

        policy = clipped_surrogate(batch, config.cliprange, config.cliprange)
        bounded = torch.minimum(policy, -batch.advantages * config.dual_clip)
        return _with_value(config, batch, torch.where(batch.advantages < 0, bounded, policy))

    return loss


def _with_value(config: ClipConfig, batch: PolicyBatch, policy: Tensor) -> LossOutput:
    """The policy's loss, half the clipped squared error of the value, and the entropy, each a mean over tokens.

    Without a value function there is no value loss.
    """
    import torch

    policy_loss, entropy = token_mean(batch, policy), token_mean(batch, batch.entropy)
    loss = policy_loss - config.entropy_coef * entropy
    metrics = {"policy_loss": policy_loss.detach()}
    if batch.values is not None and batch.old_values is not None and batch.returns is not None:
        change = (batch.values - batch.old_values).clamp(-config.value_cliprange, config.value_cliprange)
        errors = (batch.values - batch.returns) ** 2, (batch.old_values + change - batch.returns) ** 2
        value_loss = token_mean(batch, 0.5 * torch.maximum(*errors))
        loss = loss + config.value_coef * value_loss
        metrics["value_loss"] = value_loss.detach()
    return LossOutput(loss, metrics | ratio_metrics(batch, config.cliprange, config.cliprange))
