"""Sequences whose items are in a file, or computed on access, instead of in memory."""

from __future__ import annotations

import array
import itertools
import os
import pickle
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast, overload

T = TypeVar("T")


class Items(Protocol):
    """A file of items."""

    def read(self, offset: int) -> Any:
        """The item at an offset."""


class Spool(Sequence[T]):
    """Items in a file, each of which is read when it is accessed.

    Slices share the file. A spool can be pickled for another process, which opens the file by its path.
    """

    def __init__(self, file: Items, offsets: Sequence[int]) -> None:
        self.file, self.offsets = file, offsets

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Spool[T]: ...
    def __getitem__(self, index: int | slice) -> T | Spool[T]:
        if isinstance(index, slice):
            return Spool(self.file, self.offsets[index])
        return cast(T, self.file.read(self.offsets[index]))

    def __iter__(self) -> Iterator[T]:
        return map(self.file.read, self.offsets)

    def keep(self, indices: Iterable[int]) -> None:
        """Keep only the items at these indices."""
        self.offsets = array.array("q", [self.offsets[index] for index in indices])


class _File:
    """A file of pickled items. It is deleted when this object is garbage-collected in the process that wrote it."""

    def __init__(self, path: Path, is_own: bool) -> None:
        self.path = path
        self._handles: dict[int, IO[bytes]] = {}  # one for each process: forks would share the position
        weakref.finalize(self, _drop, self._handles, path, os.getpid() if is_own else None)

    def read(self, offset: int) -> Any:
        """The item at an offset."""
        process = os.getpid()
        if process not in self._handles:
            self._handles[process] = self.path.open("rb")
        self._handles[process].seek(offset)
        return pickle.load(self._handles[process])

    def __reduce__(self) -> Any:
        return _File, (self.path, False)


def _drop(handles: dict[int, IO[bytes]], path: Path, owner: int | None) -> None:
    for handle in handles.values():
        handle.close()
    if owner == os.getpid():
        path.unlink(missing_ok=True)


class Mapped(Sequence[T]):
    """The results of a function for the items of a sequence, each of which is computed when it is accessed."""

    def __init__(self, function: Callable[[Any], T], items: Sequence[Any]) -> None:
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Mapped[T]: ...
    def __getitem__(self, index: int | slice) -> T | Mapped[T]:
        if isinstance(index, slice):
            return Mapped(self._function, self._items[index])
        return self._function(self._items[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._function, self._items)


def spool(items: Iterable[T]) -> Spool[T]:
    """Write items to a temporary file. It is deleted when no spool of this process refers to it."""
    handle, name = tempfile.mkstemp(prefix="alignkit-rows-")
    written, offsets = _File(Path(name), is_own=True), array.array("q")
    with open(handle, "wb") as file:
        for item in items:
            offsets.append(file.tell())
            pickle.dump(item, file, protocol=pickle.HIGHEST_PROTOCOL)
    return Spool(written, offsets)


def selected(items: Sequence[T], indices: Iterable[int]) -> Sequence[T]:
    """The items at these indices: a list, or a spool of the same file."""
    if isinstance(items, Spool):
        part: Spool[T] = items[:]
        part.keep(indices)
        return part
    return [items[index] for index in indices]


def keep(items: Sequence[T], indices: Iterable[int]) -> None:
    """Keep only the items at these indices in a list or a spool, in place."""
    if isinstance(items, Spool):
        items.keep(indices)
    elif isinstance(items, list):
        items[:] = [items[index] for index in indices]


def copies(items: Sequence[Any]) -> list[int]:
    """For each item of a list or a spool, how many times the same item occurs before it.

    A weight in ``data.path`` repeats rows. An equal row of another line is not the same item.
    """
    identities = items.offsets if isinstance(items, Spool) else [id(item) for item in items]
    seen: Counter[int] = Counter()
    result = []
    for identity in identities:
        result.append(seen[identity])
        seen[identity] += 1
    return result


IN_MEMORY = 20_000  # items; more are written to a file


def stored(items: Iterable[T]) -> Sequence[T]:
    """The items as a list, or as a spool if they are many."""
    iterator = iter(items)
    first = list(itertools.islice(iterator, IN_MEMORY))
    if len(first) < IN_MEMORY:
        return first
    return spool(itertools.chain(first, iterator))
