"""Estimators of the KL to the reference for the loss, per token (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl_estimate(name: str, logps: Tensor, old_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The KL of the policy from the reference at each token, [B, A], with a gradient.

    Tokens are sampled from the old policy. The mean gradient of ``k2``, and of ``k1`` and ``k3`` times the probability
    ratio, is then that of the KL. Without the ratio that of ``k1`` is 0, and that of ``k3`` (``k3-plain``, as in
    arXiv 2402.03300) is the gradient of the KL of the reference from the policy.
    """
    log_ratio = logps - ref_logps
    if name == "k2":
        return log_ratio**2 / 2
    estimate = log_ratio if name == "k1" else (-log_ratio).exp() - 1 + log_ratio
    return estimate if name == "k3-plain" else (logps - old_logps).exp() * estimate
