"""Advantages from scores: within each group of answers to one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from alignkit.online import Advantages, OnlineTrainer, Rollouts, kl_penalty

if TYPE_CHECKING:
    from alignkit_group_advantage import GroupConfig


class GroupTrainer(OnlineTrainer):
    """Everything but the advantages is alignkit's."""

    config: GroupConfig

    def estimate_advantages(self, rollouts: Rollouts) -> Advantages:
        """The score relative to its group, and from each token on the KL penalty of the rest of the answer."""
        relative = relative_scores(
            rollouts.scores, rollouts.kept, self.config.samples_per_prompt, scale=self.config.scale
        )
        penalty = kl_penalty(rollouts.logps, rollouts.ref_logps, rollouts.mask, self.kl_coef)
        penalty_to_end = penalty.flip(1).cumsum(1).flip(1)
        return Advantages((relative[:, None] + penalty_to_end) * rollouts.mask)


def relative_scores(scores: Tensor, kept: Tensor, size: int, scale: bool) -> Tensor:
    """Scores [B] less the mean of their group, divided by its standard deviation if ``scale``.

    Groups are ``size`` consecutive answers; those that are not in ``kept`` [B] do not count.
    """
    scores, kept = scores.view(-1, size), kept.view(-1, size)
    number = kept.sum(1, keepdim=True).clamp(min=1)
    centered = (scores - (scores * kept).sum(1, keepdim=True) / number) * kept
    if scale:
        variance = (centered**2).sum(1, keepdim=True) / (number - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + 1e-4)
    return centered.flatten()
