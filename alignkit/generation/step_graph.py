"""The forward pass of one decoding step as a CUDA graph.

Decoding a token launches over a thousand small kernels, which takes longer than to run them. A graph launches all of
them at once, but always with the same memory. So here every input stays at its address, and attention is over the whole
cache, in which a mask hides positions without a token. On other devices the same forward runs without a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignkit.generation.cache import FixedLayer
from alignkit.models.transformers_internals import attention_of, has_static_shapes


def is_possible(model: Any, cache: Any) -> bool:
    """Whether a step of ``model`` can be a graph: it supports static shapes, and each layer of the cache has its size.

    Attention must take a mask [B, 1, 1, length] that is added to its scores.
    """
    fixed = all(isinstance(layer, FixedLayer) for layer in cache.layers)
    return fixed and has_static_shapes(model) and attention_of(model.config) in ("eager", "sdpa")


class StepGraph:
    """A step of decoding with B rows. It writes to ``cache``, whose number of positions :meth:`release` updates."""

    def __init__(self, model: Any, cache: Any, mask: Tensor, last: Tensor) -> None:
        self.model, self.cache = model, cache
        self.ids = last.clone()  # [B, 1]
        self.positions = mask.sum(1, keepdim=True) - 1  # [B, 1]
        self.slot = torch.tensor([mask.shape[1] - 1], device=mask.device)  # the place of `ids` in the cache
        kind = mask.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else model.dtype
        self.autocast = torch.autocast(kind, dtype, enabled=autocast, cache_enabled=False)  # a graph keeps no cache
        shape = len(mask), 1, 1, cache.layers[0].length
        self.bias = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=mask.device)
        self.bias[..., : mask.shape[1]].masked_fill_(mask[:, None, None].bool(), 0)
        for layer in cache.layers:
            layer.fix(self.slot)
        self.graph = None if kind != "cuda" else self._capture()

    def logits(self) -> Tensor:
        """The logits of the next token, [B, 1, V]. They are overwritten by the next call."""
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self.output

    def append(self, tokens: Tensor) -> None:
        """Append one token to each row, [B]."""
        self.ids.copy_(tokens[:, None])
        self.positions += 1
        self.slot += 1
        self.bias.index_fill_(3, self.slot, 0)

    def release(self, positions: int) -> None:
        """Give the cache back, with this number of positions."""
        for layer in self.cache.layers:
            layer.release(positions)

    def _forward(self) -> Tensor:
        inputs = {"input_ids": self.ids, "attention_mask": self.bias, "position_ids": self.positions}
        with self.autocast:
            logits: Tensor = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits
        return logits

    def _capture(self) -> Any:
        """A graph of the forward. It runs once before, on another stream as CUDA requires, to set up its kernels."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._forward()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self._forward()
        return graph
