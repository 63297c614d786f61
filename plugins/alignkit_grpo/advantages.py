"""Scores relative to their group, and the weights of tokens in the loss. Pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit_grpo.config import Advantage, Aggregate


def relative_scores(scores: Tensor, kept: Tensor, size: int, advantage: Advantage) -> Tensor:
    """Scores [B] relative to those of their group, which is ``size`` consecutive answers.

    ``group`` is (r - mean) / (std + 1e-4) with the unbiased deviation (arXiv 2402.03300, eq. 3), ``leave-one-out`` r
    minus the mean of the others (2402.14740), otherwise r - mean (2503.20783). Answers that are not in ``kept`` [B] do
    not count; they, and an answer that is the only one kept of its group, have 0.
    """
    scores, kept = scores.view(-1, size), kept.view(-1, size)
    number = kept.sum(1, keepdim=True)
    others = (number - 1).clamp(min=1)
    centered = (scores - (scores * kept).sum(1, keepdim=True) / number.clamp(min=1)) * kept
    if advantage == "group":
        centered = centered / (((centered**2).sum(1, keepdim=True) / others).sqrt() + 1e-4)
    elif advantage == "leave-one-out":
        centered = centered * number / others
    return centered.flatten()


def without_spread(scores: Tensor, kept: Tensor, size: int) -> Tensor:
    """Whether the kept scores of each group are equal up to rounding, without a learning signal: [B / size] bool."""
    import torch

    scores, kept = scores.view(-1, size), kept.view(-1, size)
    lowest = scores.masked_fill(~kept, torch.inf).amin(1)
    highest = scores.masked_fill(~kept, -torch.inf).amax(1)
    return (kept.sum(1) < 2) | torch.isclose(lowest, highest)


def token_weights(mask: Tensor, aggregate: Aggregate, num_tokens: Tensor, num_answers: Tensor, longest: int) -> Tensor:
    """The weight of each token in the loss, [B, A]; ``mask`` [B, A] is True on the answers' tokens.

    ``token`` is a mean over the ``num_tokens`` of the optimizer step, ``sequence`` a mean over its ``num_answers`` of
    the means over their tokens, ``constant`` the sum over tokens divided by ``num_answers`` times ``longest``.
    """
    if aggregate == "token":
        return mask / num_tokens
    length = mask.sum(1, keepdim=True).clamp(min=1) if aggregate == "sequence" else longest
    return mask / (num_answers * length)
