"""Answers sampled by a copy of the policy in another process: a check of the copy, and truncated importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.batches import OffPolicy
from alignkit.errors import UnavailableError
from alignkit.online.statistics import Statistics


def importance_weights(
    settings: OffPolicy, logps: Tensor, sampled: Tensor, mask: Tensor, statistics: Statistics
) -> tuple[Tensor | None, dict[str, float]]:
    """Truncated importance weights ``min(p / q, cap)`` of tokens that q sampled [B, A], and metrics.

    Multiplied by them, advantages give the gradient for tokens of the policy p, with a bounded variance
    (Ionides 2008, "Truncated Importance Sampling").

    Args:
        settings: what the engine returned with the answers.
        logps: log-probabilities of the policy's forward pass, [B, A].
        sampled: those of the copy, [B, A].
        mask: True on the answers' tokens, [B, A].
        statistics: computes means over all processes.

    Raises:
        UnavailableError: the log-probabilities differ by more than ``settings.max_difference``.
    """
    log_ratio = (logps - sampled) * mask
    difference = statistics.mean(log_ratio.abs(), mask)
    if not difference <= settings.max_difference:
        raise UnavailableError(
            f"the rollout engine's log-probabilities differ by {difference:.2g} nats per token from the policy's, more "
            f"than {settings.max_difference:g}: it samples from another model. It may have another base model, dtype "
            "or temperature, or an old adapter"
        )
    metrics = {"rollout_logps_difference": difference}
    if settings.cap is None:
        return None, metrics
    ratio = log_ratio.exp()
    weights = ratio.clamp(max=settings.cap)
    metrics["importance_weight"] = statistics.mean(weights, mask)
    metrics["importance_truncated"] = statistics.mean((ratio > settings.cap).to(torch.float), mask)
    return weights, metrics
