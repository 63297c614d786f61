"""From rankings to pairs, and from pairs to the tensors of one forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.data import IGNORE, Branches, Mapped, Ranked, ids_key
from alignkit.models import collate_separate, collate_tree, tree_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Pair = dict[str, Any]  # TRL's columns prompt_ids, chosen_ids and rejected_ids, and prompt_index


COLUMNS = {"prompt_ids": "list<int32>", "chosen_ids": "list<int32>", "rejected_ids": "list<int32>"}
COLUMNS |= {"prompt_index": "int64"}


def pairs_of(rankings: Sequence[Ranked]) -> Sequence[Pair]:
    """Every pair of answers with different ranks, of every ranking; each is made when it is asked for."""
    index: dict[bytes, int] = {}  # of each distinct prompt
    places = [
        (number, better, worse, index.setdefault(ids_key(ranked.branches.prompt), len(index)))
        for number, ranked in enumerate(rankings)
        for better, worse in ranked.pairs()
    ]

    def pair(place: tuple[int, int, int, int]) -> Pair:
        number, better, worse, prompt_index = place
        branches = rankings[number].branches
        chosen, rejected = branches.answers[better], branches.answers[worse]
        return {
            "prompt_ids": branches.prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "prompt_index": prompt_index,
        }

    return Mapped(pair, places)


@dataclass
class Collator:
    """Makes a batch of pairs. Each distinct answer is in it once, however many of the pairs have it."""

    pad: int
    tree: torch.dtype | None = None  # compute a prompt once for all its answers, with a mask of this dtype

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """The tensors of :func:`inputs`, and ``pairs`` [B, 2]: the indices of the chosen and the rejected answers."""
        import torch

        groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}  # prompt -> its answers -> their indices
        for pair in pairs:
            answers = groups.setdefault(tuple(pair["prompt_ids"]), {})
            for name in ("chosen_ids", "rejected_ids"):
                answers.setdefault(tuple(pair[name]), 0)
        index = itertools.count()
        for answers in groups.values():
            for answer in answers:
                answers[answer] = next(index)
        batch = inputs([Branches(list(prompt), [*map(list, answers)]) for prompt, answers in groups.items()], self)
        batch["pairs"] = torch.tensor(
            [[groups[tuple(p["prompt_ids"])][tuple(p[n])] for n in ("chosen_ids", "rejected_ids")] for p in pairs]
        )
        batch["prompt_index"] = torch.tensor([pair.get("prompt_index", 0) for pair in pairs])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch


def inputs(groups: Sequence[Branches], collator: Collator) -> dict[str, Tensor]:
    """Prompts with N answers in all as a model's inputs with labels, and where each answer's log-probabilities are.

    ``rows`` [N] and ``columns`` [N, A] index the log-probabilities that a model computes with these labels: that of a
    token is one column to the left of it. ``lengths`` [N] are the answers', ``tokens`` [1] is the number of tokens of
    the whole forward pass. The last token of the prompt begins every answer's branch, so that each answer's first token
    stands to the right of the one that predicts it.
    """
    import torch

    shifted = [Branches(g.prompt[:-1], [[g.prompt[-1], *answer] for answer in g.answers]) for g in groups]
    if collator.tree is not None:
        batch = collate_tree(shifted, collator.pad, collator.tree)
    else:
        batch = collate_separate(shifted, collator.pad)
        del batch["position_ids"]  # rows that begin at their first token need none
    lengths = torch.tensor([len(answer) for group in groups for answer in group.answers])
    ends = batch.pop("ends")
    places = torch.arange(int(lengths.max()))
    columns = (ends[:, 1:] - lengths[:, None] + places).clamp(max=batch["input_ids"].shape[1] - 2)
    labels = torch.full_like(batch["input_ids"], IGNORE)
    answer, place = (places < lengths[:, None]).nonzero(as_tuple=True)
    labeled = ends[answer, 0], columns[answer, place] + 1
    labels[labeled] = batch["input_ids"][labeled]
    tokens = sum(map(tree_size, shifted)) if collator.tree is not None else int(batch["attention_mask"].sum())
    more = {"rows": ends[:, 0], "columns": columns, "lengths": lengths, "tokens": torch.tensor([tokens])}
    return {**batch, "labels": labels, **more}
