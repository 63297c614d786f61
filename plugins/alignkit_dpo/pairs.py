"""From rankings to pairs, and from pairs to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.data.chat_template import IGNORE
from alignkit.data.encoding import Branches, Ranked
from alignkit.models import branches

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Pair = dict[str, Any]  # prompt_ids, chosen_ids, rejected_ids: TRL's columns; number: that of its prompt


def pairs_of(rankings: Sequence[Ranked]) -> list[Pair]:
    """Every pair of every ranking; ties make none."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        {
            "prompt_ids": ranked.branches.prompt,
            "chosen_ids": ranked.branches.answers[better],
            "rejected_ids": ranked.branches.answers[worse],
            "number": numbers.setdefault(tuple(ranked.branches.prompt), len(numbers)),
        }
        for ranked in rankings
        for better, worse in ranked.pairs()
    ]


@dataclass
class Collator:
    """Pairs as a batch. An answer is there once, however many of the batch's pairs it is in."""

    pad: int
    tree: torch.dtype | None = None  # of the mask, where a prompt is computed once for all its answers; else None

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """What :func:`forward` takes, and ``pairs`` [B, 2]: the numbers of the chosen and the rejected answers."""
        import torch

        groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for pair in pairs:
            answers = groups.setdefault(tuple(pair["prompt_ids"]), {})
            for name in ("chosen_ids", "rejected_ids"):
                answers.setdefault(tuple(pair[name]), 0)
        number = 0
        for answers in groups.values():
            for answer in answers:
                answers[answer], number = number, number + 1
        batch = inputs([(list(prompt), [list(a) for a in answers]) for prompt, answers in groups.items()], self)
        batch["pairs"] = torch.tensor(
            [[groups[tuple(p["prompt_ids"])][tuple(p[n])] for n in ("chosen_ids", "rejected_ids")] for p in pairs]
        )
        batch["number"] = torch.tensor([pair.get("number", 0) for pair in pairs])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch


def inputs(groups: Sequence[tuple[list[int], list[list[int]]]], how: Collator) -> dict[str, Tensor]:
    """Prompts with their N answers as a model's input with labels, and where each answer's tokens are.

    ``rows`` [N] and ``columns`` [N, A] are of the log-probabilities that a model gives with these labels, which stand
    one to the left of their tokens; ``lengths`` [N] are the answers', ``tokens`` [1] those of the whole forward. The
    last token of the prompt is at the head of every answer's branch, so that each next token is right of the one that
    says it.
    """
    import torch

    found = [Branches(prompt[:-1], [[prompt[-1], *answer] for answer in answers]) for prompt, answers in groups]
    if how.tree is not None:
        batch = branches.tree(found, how.pad, how.tree)
    else:
        batch = branches.separate(found, how.pad)
        del batch["position_ids"]  # rows that begin at their first token need none
    lengths = torch.tensor([len(answer) for _, answers in groups for answer in answers])
    ends = batch.pop("ends")
    places = torch.arange(int(lengths.max()))
    columns = (ends[:, 1:] - lengths[:, None] + places).clamp(max=batch["input_ids"].shape[1] - 2)
    labels = torch.full_like(batch["input_ids"], IGNORE)
    row, place = (places < lengths[:, None]).nonzero(as_tuple=True)
    at = ends[row, 0], columns[row, place] + 1
    labels[at] = batch["input_ids"][at]
    there = sum(map(branches.size, found)) if how.tree is not None else int(batch["attention_mask"].sum())
    more = {"rows": ends[:, 0], "columns": columns, "lengths": lengths, "tokens": torch.tensor([there])}
    return {**batch, "labels": labels, **more}
