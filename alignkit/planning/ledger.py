"""Counts the bytes of all tensors that are alive, and what they are for at the peak of each phase of a run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from alignkit.models.torch_internals import TorchDispatchMode, storage_key, tree_leaves

GIB = 2**30


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors that operations return in this context, until they are freed.

    ``described`` returns the bytes of tensors that are known, by what they are for. It is called at a peak, and the
    other bytes there are called ``other``.
    """

    def __init__(self, other: str = "activations") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.other = other
        self.described: Callable[[], Mapping[str, int]] = dict
        self.phases: dict[str, dict[str, int]] = {}  # phase -> part -> bytes at the peak of the phase
        self._sizes: dict[int, int] = {}  # by storage
        self._peak = 0  # of the current phase, since it began or from an earlier time
        self._at_peak = False  # whether the bytes of the peak are those of now
        self._phase = ""
        self._counts = True  # whether a peak of now belongs to the phase
        self.most = 0  # since the beginning of the context :meth:`apart`
        self.marked = 0  # bytes at a time to which others are compared

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        if self.now > self._peak and self._counts:
            self._peak, self._at_peak = self.now, True
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        if self._at_peak:
            self._record()
        self.now -= self._sizes.pop(key, 0)

    def _record(self) -> None:
        """Note what the tensors of now are for, which are those of the peak."""
        self._at_peak = False
        if self._phase:
            known = {part: size for part, size in self.described().items() if size}
            self.phases[self._phase] = {**known, self.other: self.now - sum(known.values())}

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Count no peak of the phase in this context. :attr:`most` has the most bytes in it."""
        if self._at_peak:
            self._record()
        outer, self.most, self._counts = (self.most, self._counts), self.now, False
        try:
            yield
        finally:
            self.most, self._counts = outer

    def reach(self, extra: int) -> None:
        """Count as many bytes more for a moment."""
        self.most = max(self.most, self.now + extra)
        if self.now + extra > self._peak and self._counts:
            self.now += extra
            self._peak = self.now
            self._record()
            self.now -= extra

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what happens in this context to a phase. Its peak is the largest of all its contexts."""
        outer = self._phase
        self._enter(name)
        if self.now > self._peak:
            self._peak, self._at_peak = self.now, True
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, phase: str) -> None:
        if self._at_peak:
            self._record()
        self._phase, self._peak = phase, sum(self.phases.get(phase, {}).values())


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the storages of tensors, each counted once."""
    storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
