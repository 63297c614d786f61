"""A key-value cache with room for a whole answer, so that a new token is written in place."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class FixedLayer(DynamicLayer):
    """The cache of one layer: ``keys`` and ``values`` are views of buffers of ``length`` positions.

    ``DynamicLayer`` copies the whole cache for every token.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.buffers: tuple[Tensor, Tensor]  # [B, heads, length, d]
        self.slot: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states [B, heads, new, d] of new positions; the states of all positions."""
        if self.slot is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.slot, states.to(buffer.dtype))
            return self.buffers
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not start:
            self.buffers = self._room(key_states, len(key_states)), self._room(value_states, len(value_states))
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def fix(self, slot: Tensor) -> None:
        """Until :meth:`release`, write at the position that the tensor ``slot`` [1] holds, and return whole buffers."""
        for buffer in self.buffers:
            buffer[:, :, self.get_seq_length() :] = 0  # what a mask hides must be finite
        self.slot = slot

    def release(self, positions: int) -> None:
        """Undo :meth:`fix`; this many positions are filled."""
        self.slot = None
        self.keys, self.values = (buffer[:, :, :positions] for buffer in self.buffers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the rows ``beam_idx``; a row can be selected more than once."""
        if not (end := self.get_seq_length()):
            return
        former, rows = self.buffers, len(beam_idx)
        self.buffers = self._room(former[0], rows), self._room(former[1], rows)
        for buffer, states in zip(self.buffers, former, strict=True):
            buffer[:, :, :end] = states[:, :, :end].index_select(0, beam_idx)
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

    def _room(self, states: Tensor, rows: int) -> Tensor:
        return states.new_empty(rows, states.shape[1], self.length, states.shape[-1])


def cache_of(config: Any, length: int) -> transformers.DynamicCache:
    """A cache for ``length`` positions. Only layers of full attention get one of fixed size.

    Raises:
        NotImplementedError: the architecture has a kind of cache of its own, whose rows may not be selectable.
    """
    cache = transformers.DynamicCache(config=config.get_text_config(decoder=True))
    if any(type(layer).__module__ != DynamicLayer.__module__ for layer in cache.layers):
        raise NotImplementedError("its cache has layers of another kind")
    cache.layers = [FixedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
