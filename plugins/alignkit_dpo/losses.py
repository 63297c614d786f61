"""Losses on :class:`alignkit.PreferenceLogps`: functions of what policy and reference say of two answers.

Each is the mean over the pairs of the batch. TRL's other losses are in :mod:`alignkit_dpo.trl_losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignkit import LossOutput, PreferenceLogps
from alignkit_dpo.config import BetaConfig, RobustConfig, SimpoConfig

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[[PreferenceLogps], LossOutput]


def log_ratios(batch: PreferenceLogps) -> tuple[Tensor, Tensor]:
    """log(policy / reference) of the chosen and of the rejected answers, [B] each."""
    assert batch.ref_chosen is not None
    assert batch.ref_rejected is not None
    return batch.chosen - batch.ref_chosen, batch.rejected - batch.ref_rejected


def sigmoid(config: BetaConfig) -> Function:
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid of beta times the difference of the log-ratios."""

    def loss(batch: PreferenceLogps) -> LossOutput:
        import torch.nn.functional as F  # noqa: N812

        chosen, rejected = log_ratios(batch)
        return LossOutput(-F.logsigmoid(config.beta * (chosen - rejected)).mean())

    return loss


def ipo(config: BetaConfig) -> Function:
    """IPO (arXiv 2310.12036, eq. 17): the squared distance of the difference from 1 / (2 beta).

    Log-ratios are per token, as in TRL, whose authors had that from the paper's.
    """

    def loss(batch: PreferenceLogps) -> LossOutput:
        chosen, rejected = log_ratios(batch)
        difference = chosen / batch.chosen_length - rejected / batch.rejected_length
        return LossOutput(((difference - 1 / (2 * config.beta)) ** 2).mean())

    return loss


def hinge(config: BetaConfig) -> Function:
    """SLiC's (arXiv 2305.10425) on DPO's reward: zero where beta times the difference is 1 or more."""

    def loss(batch: PreferenceLogps) -> LossOutput:
        chosen, rejected = log_ratios(batch)
        return LossOutput((1 - config.beta * (chosen - rejected)).clamp(min=0).mean())

    return loss


def robust(config: RobustConfig) -> Function:
    """DPO that is unbiased where a share of the pairs is labelled wrongly (arXiv 2403.00409, eq. 7)."""

    def loss(batch: PreferenceLogps) -> LossOutput:
        import torch.nn.functional as F  # noqa: N812

        chosen, rejected = log_ratios(batch)
        scaled, wrong = config.beta * (chosen - rejected), config.label_smoothing
        right, flipped = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
        return LossOutput((((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)).mean())

    return loss


def simpo(config: SimpoConfig) -> Function:
    """SimPO (arXiv 2405.14734, eq. 6): the reward is the mean log-probability of a token, without a reference."""

    def loss(batch: PreferenceLogps) -> LossOutput:
        import torch.nn.functional as F  # noqa: N812

        difference = batch.chosen / batch.chosen_length - batch.rejected / batch.rejected_length
        return LossOutput(-F.logsigmoid(config.beta * difference - config.gamma).mean())

    return loss
