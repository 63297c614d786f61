"""Random numbers that depend on the place in a run alone, so that resuming needs no saved state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments

SHUFFLE, SAMPLE = 1, 2  # purposes of a seed; SAMPLE + n samples answers again for the n-th time
REDRAWS = 4  # the largest n


def seed(args: TrainingArguments, iteration: int, purpose: int) -> int:
    """A seed from the run's seed, the iteration, the process and the purpose."""
    return (((args.seed * 1_000_003 + iteration) * 1_009 + args.process_index) * 7 + purpose) % 2**32


def shuffled_passes(size: int, first: int, number: int, seed: int) -> list[int]:
    """Indices ``first`` to ``first + number`` of an endless sequence of passes over ``size`` items, shuffled each."""
    passes, skipped = divmod(first, size)
    order: list[int] = []
    while len(order) < skipped + number:
        generator = torch.Generator().manual_seed(seed + passes)
        order += torch.randperm(size, generator=generator).tolist()
        passes += 1
    return order[skipped:][:number]
