"""A rollout engine that samples one prompt at a time: slow, but without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignkit import NoConfig, Rollout, Sampling, hookimpl

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Engine = Callable[["nn.Module", list[list[int]]], list[list[int]]]


def build(config: NoConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Engine:
    """Return the engine: from the policy and the prompts' token ids to ``sampling.samples`` answers per prompt."""
    from alignkit.generation import sample

    def one_by_one(policy: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        return [answer for prompt in prompts for answer in sample(policy, tokenizer, [prompt], sampling)]

    return one_by_one


@hookimpl
def alignkit_rollout() -> list[Rollout]:
    return [Rollout(name="my-thing", summary="one prompt at a time", build=build)]
