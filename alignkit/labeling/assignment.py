"""Who labels what, and in which order answers are shown. Decided by hashes, so a restart changes nothing."""

from __future__ import annotations

import hashlib


def for_everyone(seed: int, item: int, overlap: float) -> bool:
    """Whether all labelers get an item. ``overlap`` is the share of such items."""
    return int.from_bytes(_hash(seed, "overlap", item)[:8]) < overlap * 2**64


def blind_order(seed: int, labeler: str, item: int, k: int) -> list[int]:
    """The order in which a labeler sees the K answers of an item: the index in the row for each place on the page."""
    return sorted(range(k), key=lambda answer: _hash(seed, "order", labeler, item, answer))


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
