"""Dividing the answers of an iteration into forward passes.

Answers of about equal length go together, which keeps padding low. Where prompts are shared, the answers to one prompt
stay next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def by_length(rows: Sequence[int], lengths: Sequence[int], group: int, size: int) -> Iterator[list[int]]:
    """``rows`` in parts of ``size``, the longest first. Rows of one group of ``group`` neighbors stay together.

    Args:
        rows: indices of answers.
        lengths: of all answers with their prompts, in tokens.
        group: answers to one prompt that share it; 1 if prompts are not shared.
        size: answers in a forward pass.
    """
    longest: dict[int, int] = {}
    for row in rows:
        longest[row // group] = max(longest.get(row // group, 0), lengths[row])
    order = sorted(rows, key=lambda row: (-longest[row // group], row // group, row))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def shuffled(number: int, group: int, generator: torch.Generator) -> list[int]:
    """``number`` indices in random order, groups of ``group`` neighbors together."""
    groups = torch.randperm(number // group, generator=generator).tolist()
    return [index * group + member for index in groups for member in range(group)]
