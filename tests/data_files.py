"""Small data files, and the fixture that reads them; ``conftest.py`` registers it for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignkit import DataError, Demonstration, Prompt, Ranking, Rated, Row, Text
from alignkit.config import DataConfig
from alignkit.data.reading import Rows, load
from alignkit.registry import Registry

ANY = (Demonstration, Ranking, Rated, Prompt, Text)
ROWS = [{"text": "one"}, {"text": "zwölf"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


@pytest.fixture
def read(registry: Registry) -> Callable[..., Rows]:
    def read(path: Path | str, accepts: tuple[type[Row], ...] = ANY, **config: Any) -> Rows:
        return load(registry, DataConfig(**config), str(path), accepts)

    return read


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def write_parquet(file: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


def complaint(read: Callable[..., Rows], path: Path | str, *accepts: type[Row], **config: Any) -> str:
    """The text of the DataError that reading gives, which is one line."""
    with pytest.raises(DataError) as caught:
        read(path, accepts or ANY, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)
