"""What DPO logs about a batch of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit import LossOutput, PreferenceLogps

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
            "loss": output.loss.detach().expand(len(chosen)),
            "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected),
            "margin": chosen - rejected,
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "logps_chosen": batch.chosen.detach(),
            "logps_rejected": batch.rejected.detach(),
            **{name: _full_like(chosen, value) for name, value in output.metrics.items()},
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


def _full_like(values: Tensor, value: Tensor | float) -> Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to(values.device, values.dtype, non_blocking=True).reshape(()).expand_as(values)
    return torch.full_like(values, float(value))
