"""Giving memory of this process back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys

M_MMAP_THRESHOLD = -3  # of mallopt(3)


def release_freed_tensors() -> None:
    """Have glibc give the memory of every freed tensor back at once. It does nothing on other systems.

    glibc keeps freed blocks of up to 32 MB for later, in a heap that cannot shrink while a block behind them is in use.
    Loading a model in 4 bits leaves such gaps after each layer: twice the size of the model. It is for a whole process,
    in which allocating takes a little longer.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def release_freed() -> None:
    """Collect garbage, and have glibc give the memory of what was freed so far back, which takes milliseconds."""
    gc.collect()
    trim()


def trim() -> None:
    """Have glibc give the memory of what was freed so far back. It does nothing on other systems."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
