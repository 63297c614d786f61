"""What goes between a stage and a loss: typed tensors in, :class:`LossOutput` out.

Any loss that takes the batch type of a stage fits that stage. Importing this module imports no torch.
Shapes: B sequences, T token positions, N scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from alignkit.rows import Conversation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenLogps:
    """Supervised fine-tuning: the log-probability of every target token."""

    logps: Tensor  # [B, T], 0 where mask is False
    mask: Tensor  # [B, T] bool, True on the response's tokens
    num_tokens: Tensor | int  # target tokens of the whole optimizer step, all microbatches and ranks together


@dataclass(frozen=True)
class RankedScores:
    """Reward modelling: a score for every answer of some groups, a group being one prompt."""

    scores: Tensor  # [N]
    group: Tensor  # [N] int, the group of each score
    rank: Tensor  # [N], lower is better; equal ranks in a group are ties
    margin: Tensor | None = None  # [N], by how much an answer is rated (optional)


@dataclass(frozen=True)
class PreferenceLogps:
    """DPO and its kin: log-probabilities summed over each answer, under the policy and under the reference."""

    chosen: Tensor  # [B] policy
    rejected: Tensor  # [B] policy
    ref_chosen: Tensor | None  # [B]; None where the loss needs no reference
    ref_rejected: Tensor | None  # [B]
    chosen_length: Tensor  # [B] tokens
    rejected_length: Tensor  # [B] tokens


@dataclass(frozen=True)
class PolicyBatch:
    """Online stages such as PPO: outputs of the policy and the value function, and what they are trained towards."""

    logps: Tensor  # [B, T] now
    old_logps: Tensor  # [B, T] when sampled
    advantages: Tensor  # [B, T]
    entropy: Tensor  # [B, T] of the policy now, in nats
    mask: Tensor  # [B, T] bool, True on the response's tokens
    num_tokens: Tensor | int  # response tokens of the whole optimizer step, all microbatches and ranks together
    values: Tensor | None = None  # [B, T] now; None, as the next two, for a stage without a value function
    old_values: Tensor | None = None  # [B, T] when sampled
    returns: Tensor | None = None  # [B, T]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    stop_ids: tuple[int, ...]  # the tokens at which an answer ends; the last token of one that ended
    top_p: float = 1.0
    samples: int = 1  # answers to each prompt


@dataclass(frozen=True)
class Answers:
    """What a reward scores: B answers and their prompts, as text and as token ids."""

    prompts: list[Conversation]
    texts: list[str]  # without the token that ends an answer
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]  # with it, where the answer ended by itself

    def take(self, which: Sequence[int]) -> Answers:
        """Those answers alone."""
        return Answers(
            [self.prompts[i] for i in which],
            [self.texts[i] for i in which],
            [self.prompt_ids[i] for i in which],
            [self.answer_ids[i] for i in which],
        )


@dataclass(frozen=True)
class LossOutput:
    """A loss to call ``backward`` on, and what to log beside it.

    Metrics are scalars reduced as the loss is: divided by ``num_tokens`` where the batch has one, else a mean over the
    batch. What is logged is then the mean over all microbatches and processes.
    """

    loss: Tensor  # scalar
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
