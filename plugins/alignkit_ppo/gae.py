"""Rewards per token, and advantages from them (steps 4 and 5 of PPO). Pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def token_rewards(scores: Tensor, kl_penalty: Tensor, mask: Tensor) -> Tensor:
    """The KL penalty at every token, plus the answer's score at its last: [B, A].

    ``scores`` [B]; ``kl_penalty`` [B, A]; ``mask`` [B, A] is True on the answers' tokens.
    """
    import torch

    last = mask.sum(1) - 1
    return kl_penalty + torch.nn.functional.one_hot(last, mask.shape[1]) * scores[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438) and returns, [B, A] each.

    Args:
        rewards: the reward of each answer token, [B, A].
        values: the value before each answer token, [B, A]. The value after an answer's last token is 0.
        mask: True on the answers' tokens, [B, A]. Where it is False, advantages and returns are 0.
        gamma: the discount factor per token.
        lam: the lambda of GAE.
    """
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
