"""Splits rows into training rows and held-out rows, and repeats training rows by the weights of their sources."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from alignkit.data.reading import ReadSource, Rows
from alignkit.data.row_cache import values
from alignkit.data.spool import selected
from alignkit.errors import DataError
from alignkit.rows import Located


class Split(NamedTuple):
    """The rows of an epoch, and the held-out rows."""

    train: Sequence[Located]
    held_out: Sequence[Located]


def split(rows: Rows, size: float | None, seed: int) -> Split:
    """Hold rows out of each source as :func:`hold_out` does, and repeat the others by the weight of their source.

    A prompt in several sources stays on the side on which the first of them has it, so a source that is added at the
    end changes no earlier split. Held-out rows are not repeated. The rows of several sources are shuffled.

    Raises:
        DataError: from :func:`hold_out`, or the weight of a source leaves none of its rows.
    """
    train: list[int] = []
    held_out: list[int] = []
    is_held_out: dict[bytes, bool] = {}  # by the key of a row of an earlier source
    for source, indices in rows.parts():
        part = rows.rows if len(rows.sources) == 1 else selected(rows.rows, indices)
        try:
            held = _held_out(part, size, seed)
        except DataError as error:
            raise error if len(rows.sources) == 1 else DataError(f"{source.path}: {error}") from None
        if len(rows.sources) > 1 and size != 0:
            held = _as_earlier(part, held, is_held_out)
        train += _weighted([indices[n] for n in range(len(part)) if n not in held], source, seed)
        held_out += [indices[n] for n in sorted(held)]
    if len(rows.sources) > 1:
        for side in (train, held_out):
            random.Random(seed).shuffle(side)
    return Split(selected(rows.rows, train), selected(rows.rows, held_out))


def _as_earlier(rows: Sequence[Located], held: set[int], is_held_out: dict[bytes, bool]) -> set[int]:
    """The indices of held-out rows, after rows with a prompt of an earlier source have moved to its side.

    Rows of their group move with them. ``is_held_out`` gets the prompts of ``rows``.
    """
    digests, groups = list(values(rows, "key")), _groups(rows)
    side: dict[int, bool] = {}  # of a group with a prompt of an earlier source
    for digest, group in zip(digests, groups, strict=True):
        if digest in is_held_out:
            side.setdefault(group, is_held_out[digest])
    moved = {
        index
        for index, (digest, group) in enumerate(zip(digests, groups, strict=True))
        if is_held_out.get(digest, side.get(group, index in held))
    }
    for index, digest in enumerate(digests):
        is_held_out.setdefault(digest, index in moved)
    return moved


def _weighted(indices: list[int], source: ReadSource, seed: int) -> list[int]:
    """The indices, each as often as the weight of the source says; the seed chooses the rows of a fraction."""
    whole, fraction = divmod(source.weight, 1)
    chosen = random.Random(seed).sample(indices, round(fraction * len(indices)))
    weighted = indices * int(whole) + sorted(chosen)
    if indices and not weighted:
        raise DataError(f"weight {source.weight:g} leaves none of the {len(indices)} training rows of {source.path}")
    return weighted


def hold_out(rows: Sequence[Located], size: float | None, seed: int) -> Split:
    """Split rows into training rows and held-out rows, reproducibly. Rows with the same prompt stay together.

    ``size`` is that of the config: a share if below 1, else a count; None is 10 %, at most 200. A prompt with many rows
    can increase the number of held-out rows, but at most to twice ``size``: a prompt with more is trained on.

    Raises:
        DataError: the size is invalid, no row would be left to train on, or no row can be held out.
    """
    held = _held_out(rows, size, seed)
    train = selected(rows, (index for index in range(len(rows)) if index not in held))
    return Split(train, selected(rows, sorted(held)))


def _held_out(rows: Sequence[Located], size: float | None, seed: int) -> set[int]:
    """The indices of the rows that :func:`hold_out` holds out."""
    if size is not None and not 0 <= size < float("inf"):
        raise DataError(f"data.eval_size must be a share or a count (got {size:g})")
    if size == 0:
        return set()
    share = 0.1 if size is None else size
    wanted = round(share * len(rows)) if share < 1 else int(min(share, len(rows)))
    if size is None:
        wanted = min(wanted, 200)
    group_of = _groups(rows)
    counts = Counter(group_of)
    groups = list(counts)
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    taken = 0
    for group in groups:
        if taken >= wanted:
            break
        if taken + counts[group] <= 2 * wanted or counts[group] == len(rows):
            held.add(group)
            taken += counts[group]
    if taken >= len(rows):
        why = "" if len(groups) > 1 else " (rows with one prompt stay together, and all have the same)"
        raise DataError(f"holding out {wanted} of {len(rows)} rows leaves none to train on{why}. Lower data.eval_size")
    if wanted and not taken:
        raise DataError(
            f"{wanted} of {len(rows)} rows cannot be held out: rows with one prompt stay together, and no prompt has "
            f"fewer than {(fewest := min(counts.values()))}. Set data.eval_size={-(-fewest // 2)} or more, or 0"
        )
    return {index for index, group in enumerate(group_of) if group in held}


def _groups(rows: Sequence[Located]) -> list[int]:
    """The group of each row. Rows with the same key are in one group, and so are rows from the same raw row."""
    number_of: dict[bytes, int] = {}  # key -> its number
    joined: list[int] = []  # number -> an earlier number of the same group, or itself
    raw_row = "", 0  # the location of the last raw row, and the number of its first row

    def first(number: int) -> int:
        while joined[number] != number:
            number = joined[number]
        return number

    numbers = []
    for where, key in zip(values(rows, "where"), values(rows, "key"), strict=True):
        number = number_of.setdefault(key, len(joined))
        if number == len(joined):
            joined.append(number)
        numbers.append(number)
        if where == raw_row[0]:
            earlier, later = sorted((first(number), first(raw_row[1])))
            joined[later] = earlier
        else:
            raw_row = where, number
    return [first(number) for number in numbers]
