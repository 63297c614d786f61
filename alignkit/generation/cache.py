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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states [B, heads, new, d] of new positions; the states of all positions."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not start:
            self.buffers = tuple(self._room(states, len(states)) for states in (key_states, value_states))
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the rows ``beam_idx``; a row can be selected more than once."""
        if not (end := self.get_seq_length()):
            return
        former, self.buffers = self.buffers, tuple(self._room(buffer, len(beam_idx)) for buffer in self.buffers)
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
        raise NotImplementedError
    cache.layers = [FixedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
