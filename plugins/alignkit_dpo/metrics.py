"""Metrics of DPO for a batch of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit import LossOutput, PreferenceLogps
from alignkit.training import loss_metrics

if TYPE_CHECKING:
    from torch import Tensor


def of_pairs(batch: PreferenceLogps, output: LossOutput, beta: float) -> dict[str, Tensor]:
    """Metrics of each pair, [B]; the loss and what it measures itself are means, the same for each pair of the batch.

    ``accuracy`` is 1 where the chosen answer has the higher implicit reward, 1/2 where both are equal.
    """
    import torch

    with torch.no_grad():
        chosen, rejected = implicit_rewards(batch, beta)
        return {
            "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected),
            "margin": chosen - rejected,
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "logps_chosen": batch.chosen.detach(),
            "logps_rejected": batch.rejected.detach(),
            **loss_metrics(output, chosen),
        }


def implicit_rewards(batch: PreferenceLogps, beta: float) -> tuple[Tensor, Tensor]:
    """The rewards of chosen and rejected answers under the policy, [B] each.

    Beta times the log-ratio to the reference, or without a reference, beta times the mean log-probability per token.
    """
    if batch.ref_chosen is None or batch.ref_rejected is None:
        chosen, rejected = batch.chosen / batch.chosen_length, batch.rejected / batch.rejected_length
    else:
        chosen, rejected = batch.chosen - batch.ref_chosen, batch.rejected - batch.ref_rejected
    return beta * chosen, beta * rejected
