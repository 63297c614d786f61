"""The formulas of RAHF (arXiv 2312.15997), as functions of tensors.

Hidden states are [L, N, d]: those of N answer tokens, after L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignkit import HiddenStates, LossOutput, NoConfig

if TYPE_CHECKING:
    from torch import Tensor


def contrast_loss(
    right: Tensor, wrong: Tensor | None, lengths: Tensor, smoothing: float, num_tokens: Tensor, num_answers: Tensor
) -> Tensor:
    """The loss of the contrast: the negative log-likelihood of each answer, and with ``wrong`` a contrastive term.

    ``right`` [B] are the log-probabilities of answers of ``lengths`` [B] tokens where they are asked for: good answers
    under the good model or instruction, bad ones under the bad one. ``wrong`` [B] are those under the opposite
    instruction. The likelihood is a mean over ``num_tokens``, the contrastive term over ``num_answers``, those of the
    optimizer step. With s = exp(mean log-probability of an answer's tokens) and smoothing e, that term is
    ``-(1 - e) log(s_right / (s_right + s_wrong)) - e log(s_wrong / (s_right + s_wrong))``.
    """
    from torch.nn.functional import logsigmoid

    loss = -right.sum() / num_tokens
    if wrong is None:
        return loss
    margin = (right - wrong) / lengths  # log(s_right / s_wrong)
    terms = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    return loss + terms.sum() / num_answers


def right_and_wrong(good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [2B] where answers are asked for, and where the opposite is.

    ``good`` and ``bad`` [2B] are those on each side of the contrast, of B good answers and then of B bad ones.
    """
    import torch

    half = len(good) // 2
    return torch.cat([good[:half], bad[half:]]), torch.cat([bad[:half], good[half:]])


def target(hidden: Tensor, good: Tensor, bad: Tensor, alpha: float) -> Tensor:
    """The targets of hidden states: moved by ``alpha`` times the difference of good and bad, in fp32.

    All are [L, N, d]: ``hidden`` of the model before training, ``good`` and ``bad`` of the two sides of the contrast.
    """
    return hidden.float() + alpha * (good.float() - bad.float())


def build_distance(config: NoConfig) -> Callable[[HiddenStates], LossOutput]:
    """Return :func:`distance`, which has no settings."""
    return distance


def distance(batch: HiddenStates) -> LossOutput:
    """The Euclidean distance of hidden states to their targets, as a mean over tokens and layers.

    Where they are equal, the gradient is 0: torch defines that of a norm at 0 so.
    """
    import torch

    distances = torch.linalg.vector_norm(batch.hidden.float() - batch.target, dim=-1)  # [L, N]
    return LossOutput(distances.mean(0).sum() / batch.num_tokens)
