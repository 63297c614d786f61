"""What roles take and return: prompts with their answers, and log-probabilities of the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Prompts and their answers as tensors: right-padded rows, and where each answer is."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    start: Tensor  # [B] tokens of the prompt
    length: Tensor  # [B] tokens of the answer

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int, device: Any) -> Sequences:
        """From token ids."""
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(
            torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device),
            (torch.arange(width, device=device) < lengths[:, None]).long(),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            torch.tensor([len(answer) for answer in answers], device=device),
        )

    @property
    def mask(self) -> Tensor:
        """[B, A] bool: the answers' tokens, A being the longest answer."""
        return torch.arange(int(self.length.max()), device=self.length.device) < self.length[:, None]


@dataclass(frozen=True)
class Logps:
    """The answers' tokens under a language model."""

    logps: Tensor  # [B, A], 0 where there is no token
    entropy: Tensor  # [B, A], of the distribution that each token was drawn from
