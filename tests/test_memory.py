"""How a process gives memory back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest

from alignkit.models import memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_given_back_though_blocks_behind_it_are_in_use() -> None:
    process = psutil.Process()
    blocks = [bytes([1]) * (100 * 1024) for _ in range(4000)]  # 400 MB, each too small for a mapping of its own
    kept = blocks[::100]
    before = process.memory_info().rss
    del blocks

    memory.release_freed()
    assert before - process.memory_info().rss > 300 * 2**20
    assert len(kept) == 40
