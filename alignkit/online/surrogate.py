"""Shared code of policy-gradient losses: means over tokens, the clipped surrogate objective, and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.batches import PolicyBatch


def token_mean(batch: PolicyBatch, values: Tensor) -> Tensor:
    """The mean of ``values`` [B, A] over the answer tokens of the optimizer step: the part of this batch, a scalar."""
    return (values * batch.mask).sum() / batch.num_tokens


def clipped_surrogate(batch: PolicyBatch, low: float, high: float) -> Tensor:
    """The negated clipped surrogate objective of each token (arXiv 1707.06347, eq. 7), [B, A].

    The probability ratio is clipped to the range from ``1 - low`` to ``1 + high``.
    """
    import torch

    ratio = (batch.logps - batch.old_logps).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)


def ratio_metrics(batch: PolicyBatch, low: float, high: float) -> dict[str, Tensor]:
    """The mean ratio, the share of ratios outside of the clip range, and the KL from the policy that sampled (k3)."""
    log_ratio = (batch.logps - batch.old_logps).detach()
    ratio = log_ratio.exp()
    return {
        "ratio": token_mean(batch, ratio),
        "clip_fraction": token_mean(batch, ((ratio < 1 - low) | (ratio > 1 + high)).float()),
        "approx_kl": token_mean(batch, ratio - 1 - log_ratio),
    }
