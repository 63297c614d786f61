"""The KL penalty to the reference, and the controller of its coefficient (step 9 of PPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl_penalty(logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """``-kl_coef * (log pi - log pi_ref)`` at every token of the answers, 0 elsewhere: [B, A].

    All tensors are [B, A]; ``mask`` is True on the answers' tokens.
    """
    return -kl_coef * (logps - ref_logps) * mask


def next_kl_coef(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The adaptive coefficient (arXiv 1909.08593, section 2.2): up to 0.2 * answers / horizon more or less.

    ``kl`` and ``target`` are in nats per answer; ``answers`` is the number of answers since the last update.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * answers / horizon)
