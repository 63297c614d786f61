"""Rows of large files are read from a file of their own when they are needed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from alignkit import DataError, Demonstration, Located
from alignkit.config import DataConfig
from alignkit.data import load
from alignkit.data.held_out import hold_out
from alignkit.data.spool import Mapped, Spool, keep, spool, stored
from alignkit.registry import Registry


def test_each_row_is_read_when_it_is_asked_for() -> None:
    rows = [Located(f"line {n}", Demonstration([{"role": "assistant", "content": "é" * n}])) for n in range(9)]
    spooled = spool(iter(rows))
    file = spooled.file.path
    assert len(spooled) == 9
    assert list(spooled) == rows == [spooled[n] for n in range(9)]
    assert spooled[-1] == rows[-1]
    assert list(spooled[2:5][1:]) == rows[3:5]
    part = spooled[1:4]
    keep(spooled, [0, 8])
    assert list(spooled) == [rows[0], rows[8]]
    del spooled
    assert list(part) == rows[1:4]
    del part
    assert not file.exists()


def test_a_process_that_gets_it_reads_the_file_and_leaves_it() -> None:
    spooled = spool(range(100))
    copy = pickle.loads(pickle.dumps(spooled[10:]))
    assert list(copy) == list(range(10, 100))
    del copy
    assert spooled[3] == 3
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:  # the forked process has a place in the file of its own
            right = all(spooled[n] == n for n in range(100))
            del spooled
            os._exit(0 if right else 1)
        assert [spooled[n] for n in range(100)] == list(range(100))
        assert os.waitpid(child, 0)[1] == 0
        assert spooled[4] == 4


def test_mapped_items_are_made_when_they_are_asked_for() -> None:
    made: list[int] = []
    mapped = Mapped(lambda n: made.append(n) or n * n, range(9))  # type: ignore[func-returns-value]
    assert len(mapped) == 9
    assert mapped[3] == 9
    assert list(mapped[7:]) == [49, 64]
    assert made == [3, 7, 8]


def test_many_items_are_stored_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.data.spool.IN_MEMORY", 5)
    assert stored(iter(range(4))) == [0, 1, 2, 3]
    assert isinstance(many := stored(iter(range(12))), Spool)
    assert list(many) == list(range(12))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_are_the_same_from_memory_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    raw: Any = [{"prompt": f"Q{n // 3}", "completion": f"A {n}é" if n != 17 else ""} for n in range(60)]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in raw))
    else:
        import datasets

        made = datasets.Dataset.from_list(raw)
        file.write_text(made.to_pandas().to_csv(index=False)) if suffix == ".csv" else made.to_parquet(file)  # type: ignore[union-attr]

    def loaded() -> Any:
        source = load(Registry(), DataConfig(on_bad_row="skip"), str(file), (Demonstration,))
        return source.rows, source.skipped, hold_out(source.rows, 10, 3)

    rows, skipped, split = loaded()
    assert len(rows) == 59
    assert len(skipped) == 1
    monkeypatch.setattr("alignkit.data.spool.IN_MEMORY", 5)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    many, also_skipped, parts = loaded()
    assert isinstance(many, Spool)
    assert (list(many), also_skipped) == (rows, skipped)
    assert [list(part) for part in parts] == [list(part) for part in split]
    with pytest.raises(DataError, match=r"(line|row) 1[89]"):
        load(Registry(), DataConfig(), str(file), (Demonstration,))


def test_a_csv_that_is_no_utf_8_is_an_error_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"prompt,completion\nQ,A\nQ,\xe9t\xe9\n")
    with pytest.raises(DataError, match="rows.csv line 3: not UTF-8"):
        load(Registry(), DataConfig(), str(file), (Demonstration,))
