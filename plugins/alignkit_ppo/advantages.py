"""From scores to advantages: steps 4 to 6 of PPO. Pure functions of tensors; B answers of at most T tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * (log pi - log pi_ref) at every token, plus the answer's score at its last: [B, T].

    ``scores`` [B]; ``logps`` and ``ref_logps`` [B, T]; ``mask`` [B, T] is True on the answers' tokens.
    """
    import torch

    per_token = -kl_coef * (logps - ref_logps) * mask
    last = mask.sum(1) - 1
    return per_token + torch.nn.functional.one_hot(last, mask.shape[1]) * scores[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) and returns, [B, T] each; the value past an end is 0."""
    import torch

    values = values * mask
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor, sums: tuple[Tensor, Tensor, Tensor], shift: bool = True) -> Tensor:
    """``values`` with variance 1, and mean 0 if ``shift``, over the masked tokens that ``sums`` are of.

    ``sums`` are the count, the sum and the sum of squares (see :func:`moments`), of all ranks together.
    """
    count, total, squares = sums
    mean = total / count
    variance = squares / count - mean**2
    white = (values - mean) * (variance + 1e-8).rsqrt()
    return (white if shift else white + mean) * mask


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The count, the sum and the sum of squares of masked values, in double precision."""
    chosen = values[mask].double()
    return mask.sum().double(), chosen.sum(), (chosen**2).sum()


def next_kl_coef(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The adaptive coefficient (arXiv 1909.08593, section 2.2): up to 0.2 * answers / horizon more or less."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * answers / horizon)
