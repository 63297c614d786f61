"""The inputs and outputs of losses, rewards, judges and rollout engines.

A loss fits every stage with the same batch type. Shapes: B sequences, T token positions of a sequence, A token
positions of an answer, N scores. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignkit.rows import Conversation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenLogps:
    """Supervised fine-tuning: the log-probability of every target token."""

    logps: Tensor  # [B, T], 0 where mask is False
    mask: Tensor  # [B, T] bool, True on target tokens
    num_tokens: Tensor | int  # target tokens of the whole optimizer step, over all microbatches and processes


@dataclass(frozen=True)
class RankedScores:
    """Reward modeling: the scores of the answers to several prompts. The answers to one prompt are a group."""

    scores: Tensor  # [N]
    group: Tensor  # [N] int, the group of each score
    rank: Tensor  # [N], lower is better; equal ranks in a group are ties
    margin: Tensor | None = None  # [N], the rating of each answer; only differences within a group matter


@dataclass(frozen=True)
class PreferenceLogps:
    """DPO and similar: log-probabilities summed over each answer, under the policy and under the reference."""

    chosen: Tensor  # [B] policy
    rejected: Tensor  # [B] policy
    ref_chosen: Tensor | None  # [B]; None if the loss needs no reference
    ref_rejected: Tensor | None  # [B]
    chosen_length: Tensor  # [B] tokens
    rejected_length: Tensor  # [B] tokens


@dataclass(frozen=True)
class RatedLogps:
    """KTO and similar: log-probabilities summed over each rated answer, under the policy and under the reference."""

    logps: Tensor  # [B] policy
    ref_logps: Tensor | None  # [B]; None if the loss needs no reference
    good: Tensor  # [B] bool
    length: Tensor  # [B] tokens
    kl: Tensor | None  # scalar, at least 0: KL to the reference, estimated on answers to other prompts; or None


@dataclass(frozen=True)
class PolicyBatch:
    """Online stages such as PPO: outputs of the policy and the value function, advantages and returns.

    Log-probabilities and entropies are at the sampling temperature.
    """

    logps: Tensor  # [B, A] of the answers' tokens under the policy now
    old_logps: Tensor  # [B, A] when sampled
    advantages: Tensor  # [B, A] times importance weights, and in GRPO times each token's weight and ``num_tokens``
    entropy: Tensor  # [B, A] of the policy now, in nats
    mask: Tensor  # [B, A] bool, True on the tokens to train on
    num_tokens: Tensor | int  # answer tokens of the whole optimizer step, over all microbatches and processes
    values: Tensor | None = None  # [B, A] now, before each token; None without a value function
    old_values: Tensor | None = None  # [B, A] when sampled
    returns: Tensor | None = None  # [B, A] the targets of ``values``


@dataclass(frozen=True)
class HiddenStates:
    """RAHF and similar: hidden states of N answer tokens after L layers, and where they should be."""

    hidden: Tensor  # [L, N, d] of the policy
    target: Tensor  # [L, N, d] in fp32
    num_tokens: Tensor | int  # answer tokens of the whole optimizer step, over all microbatches and processes


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling answers."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    stop_ids: tuple[int, ...]  # the tokens that end an answer; an answer that ended includes its stop token
    top_p: float = 1.0
    samples: int = 1  # answers to each prompt


@dataclass(frozen=True)
class OffPolicy:
    """Settings for the use of answers sampled by a copy of the policy in another process.

    The log-probabilities of the copy never replace those of the policy. They are compared with them in each iteration.
    """

    max_difference: float  # the mean absolute difference per token, in nats, above which the run stops
    cap: float | None = None  # advantages are multiplied by importance weights, at most this; None: they are not


class SampledAnswers(list[list[int]]):
    """Answers as token ids, in the order of their prompts, and optionally the log-probability of each of their tokens.

    Log-probabilities are at the sampling temperature (at 1 for greedy decoding), over the whole vocabulary.
    """

    def __init__(
        self,
        answers: Iterable[list[int]],
        logps: list[list[float]] | None = None,
        off_policy: OffPolicy | None = None,
    ) -> None:
        super().__init__(answers)
        self.logps = logps  # one for each token, or None if the engine does not compute them
        self.off_policy = off_policy  # set by an engine that samples from a copy of the policy, with its logps


@dataclass(frozen=True)
class Answers:
    """The input of a reward: B answers and their prompts, as text and as token ids."""

    prompts: list[Conversation]
    texts: list[str]  # without the token that ends an answer
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]  # with that token, if the answer ended
    fields: list[Mapping[str, Any]] | None = None  # the other fields of the prompts' rows; None without rows

    def take(self, indices: Sequence[int]) -> Answers:
        """The answers at these indices."""
        return Answers(
            [self.prompts[i] for i in indices],
            [self.texts[i] for i in indices],
            [self.prompt_ids[i] for i in indices],
            [self.answer_ids[i] for i in indices],
            None if self.fields is None else [self.fields[i] for i in indices],
        )


@dataclass(frozen=True)
class Question:
    """The input of a judge: a prompt and K >= 2 answers to it, in the order in which the judge reads them."""

    prompt: Conversation
    answers: tuple[str, ...]
    fields: Mapping[str, Any] | None = field(default=None, repr=False)  # of the row; None if verdicts are stored


@dataclass(frozen=True)
class LossOutput:
    """A loss with a gradient, and metrics to log.

    Metrics are scalars that are reduced like the loss: divided by ``num_tokens`` if the batch has it, else a mean over
    the batch. The logged value is the mean over all microbatches and processes. Names that the stages log themselves,
    such as ``kl``, are errors.
    """

    loss: Tensor  # scalar
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
