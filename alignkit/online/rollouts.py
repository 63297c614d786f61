"""The answers of an iteration, and the advantages that a stage computes from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor

T = TypeVar("T", "Rollouts", "Advantages")


@dataclass(frozen=True)
class Rollouts:
    """The answers of one iteration on this process: B answers of at most A tokens.

    Answers to the same prompt are next to each other, ``samples_per_prompt`` of them.
    """

    prompts: list[list[int]]  # token ids
    answers: list[list[int]]  # token ids, with the one that ended the answer
    scores: Tensor  # [B] of the reward, clipped, less the penalty for a missing EOS; 0 where it refused the answer
    kept: Tensor  # [B] bool, False where the reward refused the answer, which then has no part in the update
    answer_mask: Tensor  # [B, A] bool, True on the answers' tokens
    logps: Tensor  # [B, A] of the policy that sampled
    ref_logps: Tensor  # [B, A] of the reference
    values: Tensor | None  # [B, A], before each token; None without a value function
    metrics: dict[str, float]  # for the log
    weights: Tensor | None = None  # [B, A] truncated importance weights, which multiply advantages; None: all are 1

    @property
    def lengths(self) -> list[int]:
        """[B] tokens of each answer and its prompt."""
        return [len(prompt) + len(answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    @property
    def mask(self) -> Tensor:
        """[B, A] bool: the tokens to train on, which are those of the answers that the reward accepted."""
        return self.answer_mask & self.kept[:, None]


@dataclass(frozen=True)
class Advantages:
    """Advantages and returns, computed by a stage from :class:`Rollouts`."""

    advantages: Tensor  # [B, A]
    returns: Tensor | None = None  # [B, A], what values are trained toward; None without a value function
    metrics: Mapping[str, float] = field(default_factory=dict)  # for the log


def of_all_processes(rollouts: Rollouts, estimates: Advantages) -> tuple[Rollouts, Advantages]:
    """The answers of all processes, in the order of their ranks. Every process must call it."""
    tensors = {n: each for part in (rollouts, estimates) for n, each in vars(part).items() if isinstance(each, Tensor)}
    own = rollouts.prompts, rollouts.answers, {name: tensor.cpu() for name, tensor in tensors.items()}
    prompts, answers, parts = zip(*gather_object([own]), strict=True)
    joined: dict[str, Any] = {
        name: _joined([part[name] for part in parts]).to(tensors[name].device) for name in tensors
    }

    def with_joined(part: T, **lists: Any) -> T:
        return replace(part, **lists, **{name: joined[name] for name in joined.keys() & vars(part).keys()})

    rollouts = with_joined(rollouts, prompts=list(chain(*prompts)), answers=list(chain(*answers)))
    return rollouts, with_joined(estimates)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Tensors [B, ...] of which the second dimension differs, as one, with zeros at the ends of rows."""
    rows = [row for tensor in tensors for row in tensor]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
