"""Random numbers that depend on the place in a run alone, so that resuming needs no saved state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from transformers import TrainingArguments

SHUFFLE, SAMPLE = 1, 2  # purposes of a seed; SAMPLE + n samples answers again for the n-th time
REDRAWS = 4  # the largest n
PURPOSES = SAMPLE + REDRAWS + 1  # so that no two of them have a seed in common


def seed(args: TrainingArguments, iteration: int, purpose: int) -> int:
    """A seed from the run's seed, the iteration and the purpose. It is the same in all processes."""
    return ((args.seed * 1_000_003 + iteration) * 1_009 * PURPOSES + purpose) % 2**32


def set_seeds(seed: int, before: int, length: int) -> None:
    """Seed all generators before answers of at most ``length`` tokens are sampled, after ``before`` other answers.

    The engine ``decode`` draws a number for each token from torch's CPU generator. Those of the other answers are
    skipped, so that several processes draw the numbers that one would. Other generators, such as those of GPUs, get a
    seed of their own in each process.
    """
    transformers.set_seed((seed + 7 * before) % 2**32)
    torch.default_generator.manual_seed(seed)
    torch.rand(before, length, dtype=torch.double)


def shuffled_passes(size: int, first: int, number: int, seed: int) -> list[int]:
    """Indices ``first`` to ``first + number`` of an endless sequence of passes over ``size`` items, shuffled each."""
    passes, skipped = divmod(first, size)
    order: list[int] = []
    while len(order) < skipped + number:
        generator = torch.Generator().manual_seed(seed + passes)
        order += torch.randperm(size, generator=generator).tolist()
        passes += 1
    return order[skipped:][:number]
