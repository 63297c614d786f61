"""Losses for reward models: functions of the scores of ranked answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignkit import LossOutput, NoConfig, RankedScores
from alignkit_rm.config import BradleyTerryConfig

if TYPE_CHECKING:
    from torch import Tensor


def pairs(batch: RankedScores) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a group's answers with different ranks, [P]: indices of the better and the worse, and the group."""
    same_group = batch.group[:, None] == batch.group[None, :]
    better, worse = (same_group & (batch.rank[:, None] < batch.rank[None, :])).nonzero(as_tuple=True)
    return better, worse, batch.group[better]


def mean_over_groups(values: Tensor, group: Tensor) -> Tensor:
    """The mean over groups of the mean of a group's values: a ranking counts once, however many pairs it has."""
    import torch

    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    return (values / count[index]).sum() / len(count)


def bradley_terry(config: BradleyTerryConfig) -> Callable[[RankedScores], LossOutput]:
    """InstructGPT's loss (arXiv 2203.02155, eq. 1): -log sigmoid(better - worse), all pairs of a prompt together."""

    def loss(batch: RankedScores) -> LossOutput:
        import torch.nn.functional as F  # noqa: N812

        better, worse, group = pairs(batch)
        difference = batch.scores[better] - batch.scores[worse]
        if config.margin and batch.margin is not None:
            difference = difference - (batch.margin[better] - batch.margin[worse])
        values = -F.logsigmoid(difference)
        if config.centering:
            values = values + config.centering * (batch.scores[better] + batch.scores[worse]) ** 2
        return LossOutput(mean_over_groups(values, group))

    return loss


def plackett_luce(config: NoConfig) -> Callable[[RankedScores], LossOutput]:
    """The negative log-likelihood of the whole ranking (Plackett 1975).

    The best answer is drawn first, then the best of the rest. Each answer is drawn from itself and all worse ones, with
    probability softmax(scores). Answers of equal rank do not compete with each other. Taking the mean over the draws
    gives groups of different K the same weight; at K = 2 the loss is that of ``bradley-terry``.
    """

    def loss(batch: RankedScores) -> LossOutput:
        import torch

        same_group = batch.group[:, None] == batch.group[None, :]
        worse = same_group & (batch.rank[:, None] < batch.rank[None, :])  # [drawn, rest]
        drawn = worse.any(dim=1)
        rest = worse[drawn] | torch.eye(len(batch.rank), dtype=torch.bool, device=worse.device)[drawn]
        scores = batch.scores.expand_as(rest).masked_fill(~rest, -torch.inf)
        values = scores.logsumexp(dim=1) - batch.scores[drawn]
        return LossOutput(mean_over_groups(values, batch.group[drawn]))

    return loss
