"""Batches of prompts with several answers each: one row per answer, or one prompt for all its answers.

In the second form, a row holds the prompt once and its answers after it. Under a tree attention mask, a token attends
to its prompt and to the tokens before it in its own answer. Positions continue from the prompt's end in every answer.
So each answer is computed exactly as in a row of its own, while the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.data.encoding import Branches
from alignkit.models.logit_form import base_of, trunk_of
from alignkit.models.transformers_internals import attention_of


def collate_separate(groups: Sequence[Branches], pad: int) -> dict[str, Tensor]:
    """One row per answer, padded on the right: ``input_ids``, ``attention_mask``, ``position_ids`` [N, T].

    ``ends`` [N, 2] is the (row, column) of each answer's last token, in the order of the groups.
    """
    rows = [[*group.prompt, *answer] for group in groups for answer in group.answers]
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(int(lengths.max()))
    return {
        "input_ids": _padded(rows, pad),
        "attention_mask": (columns < lengths[:, None]).long(),
        "position_ids": torch.minimum(columns.expand(len(rows), -1), lengths[:, None] - 1),
        "ends": torch.stack([torch.arange(len(rows)), lengths - 1], dim=1),
    }


def collate_tree(groups: Sequence[Branches], pad: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Like :func:`collate_separate`, but with each group's prompt once, and as many groups per row as fit.

    ``attention_mask`` is additive, [R, 1, T, T] of ``dtype``.
    """
    places = pack_trees(groups)
    width, number = max(tree_size(group) for group in groups), 1 + max(row for row, _ in places)
    rows: list[list[int]] = [[pad] * width for _ in range(number)]
    allowed = torch.eye(width, dtype=torch.bool).repeat(number, 1, 1)  # padding attends to itself: no row may be empty
    positions = torch.zeros(number, width, dtype=torch.long)
    ends = []
    for group, (row, first) in zip(groups, places, strict=True):
        start = first + len(group.prompt)
        trunk = slice(first, start)
        rows[row][trunk] = group.prompt
        allowed[row, trunk, trunk] = _causal(len(group.prompt))
        positions[row, trunk] = torch.arange(len(group.prompt))
        for answer in group.answers:
            branch = slice(start, start + len(answer))
            rows[row][branch] = answer
            allowed[row, branch, trunk] = True
            allowed[row, branch, branch] = _causal(len(answer))
            positions[row, branch] = len(group.prompt) + torch.arange(len(answer))
            start = branch.stop
            ends.append((row, start - 1))
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.zeros(1, dtype=dtype).masked_fill(~allowed[:, None], torch.finfo(dtype).min),
        "position_ids": positions,
        "ends": torch.tensor(ends),
    }


def tree_size(group: Branches) -> int:
    """The number of tokens of a group with its prompt counted once."""
    return len(group.prompt) + sum(map(len, group.answers))


def pack_trees(groups: Sequence[Branches]) -> list[tuple[int, int]]:
    """The (row, column) at which each group begins: first-fit decreasing, in rows as wide as the largest group."""
    room: list[int] = []
    width = max(tree_size(group) for group in groups)
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(groups)), key=lambda index: -tree_size(groups[index])):
        needed = tree_size(groups[index])
        row = next((row for row, left in enumerate(room) if left >= needed), len(room))
        if row == len(room):
            room.append(width)
        places[index] = (row, width - room[row])
        room[row] -= needed
    return [places[index] for index in range(len(groups))]


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _padded(rows: list[list[int]], pad: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def saving(groups: Sequence[Branches], config: Any) -> float:
    """By which factor a tree takes fewer operations than separate rows, estimated from a model's config.

    A token costs two operations per weight of the layers. A pair of positions costs four operations per hidden unit and
    layer, also where the mask hides it.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    per_token = 2 * layers * (4 * width * width + 3 * width * inner)
    per_pair = 4 * layers * width
    separate = shared = 0
    for group in groups:
        trunk, lengths = len(group.prompt), [len(answer) for answer in group.answers]
        separate += sum(per_token * (trunk + n) + per_pair * (trunk + n) ** 2 for n in lengths)
        total = trunk + sum(lengths)
        shared += per_token * total + per_pair * total**2
    return separate / shared


def supports_tree(config: Any, longest: int) -> bool:
    """Whether a model accepts a 4D attention mask and explicit positions, for sequences of up to ``longest`` tokens.

    The attention must be SDPA or eager, and positions rotary or learned. No layer may keep a state (linear attention)
    or have a sliding window shorter than ``longest``.
    """
    if attention_of(config) not in ("sdpa", "eager"):
        return False
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "rotary") == "alibi":
        return False
    if getattr(config, "model_type", None) in ("bloom", "mpt"):  # ALiBi that the config does not mention
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False
    windowed = "sliding_attention" in kinds or (not hasattr(config, "layer_types"))
    window = getattr(config, "sliding_window", None)
    return not (windowed and window is not None and longest > window)


def answer_scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The output of the scalar head at the end of every answer, [N] in fp32.

    ``inputs`` come from :func:`collate_separate` or :func:`collate_tree`. ``model`` must have been prepared by
    :func:`with_answer_scores`; it may be wrapped by PEFT and by accelerate.
    """
    output: Tensor = model(**inputs, use_cache=False)
    return output


def with_answer_scores(model: Any) -> Any:
    """Make the forward of a model for sequence classification return its head's scores at ``ends``, [N] in fp32."""
    inner = base_of(model)
    trunk = trunk_of(model)

    def forward(ends: Tensor, **inputs: Any) -> Tensor:
        hidden = trunk(**{key: value for key, value in inputs.items() if value is not None}).last_hidden_state
        hidden = hidden[ends[:, 0], ends[:, 1]]
        with torch.autocast(hidden.device.type, enabled=False):  # losses take small differences of scores
            scores: Tensor = inner.score(hidden.to(inner.score.weight.dtype)).squeeze(-1).float()
        return scores

    inner.forward = forward
    return model
