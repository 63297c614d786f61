"""Inputs and outputs of roles: prompts with their answers, and log-probabilities of the answers' tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.data.encoding import Branches
from alignkit.models import prompt_trees


@dataclass(frozen=True)
class Sequences:
    """B answers of at most A tokens, with their prompts, as R rows of T tokens, and where each answer is.

    Each answer has a row of its own; or answers to one prompt branch off it in one row (``share``), so that the prompt
    is computed once. Indices are made on the CPU, so that a forward pass never waits for the device.
    """

    input_ids: Tensor  # [R, T]
    attention_mask: Tensor  # [R, T], or [R, 1, T, T] with shared prompts
    position_ids: Tensor | None  # [R, T] with shared prompts
    mask: Tensor  # [B, A] bool: the answers' tokens
    slots: Tensor  # [N] for each answer token, its index in a flattened [B, A]
    before: Tensor  # [N] for each answer token, the index in a flattened [R, T] of the token before it
    targets: Tensor  # [N] the answer tokens
    ends: Tensor  # [B] the index in a flattened [R, T] of each answer's last token

    @classmethod
    def of(
        cls,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        pad: int,
        device: Any,
        share: torch.dtype | None = None,
    ) -> Sequences:
        """From token ids. With ``share``, the mask's dtype, equal prompts that are neighbors are computed once."""
        lengths = torch.tensor([len(answer) for answer in answers])
        if share is None:
            groups = [Branches(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
            inputs = prompt_trees.collate_separate(groups, pad)
            del inputs["position_ids"]
        else:  # the last token of a prompt belongs to every branch: the first token of an answer is drawn at it
            pairs = itertools.groupby(zip(prompts, answers, strict=True), key=lambda pair: pair[0])
            groups = [Branches(p[:-1], [p[-1:] + answer for _, answer in group]) for p, group in pairs]
            inputs = prompt_trees.collate_tree(groups, pad, share)
        row, column = inputs.pop("ends").T
        end = row * inputs["input_ids"].shape[1] + column
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        answer, place = mask.nonzero(as_tuple=True)
        before = end[answer] - lengths[answer] + place
        fields = {
            "mask": mask,
            "slots": mask.flatten().nonzero().squeeze(1),
            "before": before,
            "targets": inputs["input_ids"].flatten()[before + 1],
            "ends": end,
        }
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in {**inputs, **fields}.items()}
        return cls(**{"position_ids": None, **tensors})

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a model's forward."""
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False, **positions}

    def gather(self, per_position: Tensor, index: Tensor) -> Tensor:
        """``per_position`` [R, T, ...] at ``before`` or ``ends``: [N, ...] or [B, ...]."""
        return per_position.flatten(0, 1)[index]

    def scatter(self, per_token: Tensor) -> Tensor:
        """Values of the answer tokens [N], as [B, A] with 0 where there is no token."""
        answers, places = self.slots // self.mask.shape[1], self.slots % self.mask.shape[1]
        # not a view: FSDP2 cannot guard one against changes in place
        return per_token.new_zeros(self.mask.shape).index_put((answers, places), per_token)


class Logps(NamedTuple):
    """The answers' tokens under a language model."""

    logps: Tensor  # [B, A], 0 where there is no token
    entropy: Tensor  # [B, A], of the distribution that each token was drawn from
