"""The rows of a file of samples as items to label: what a labeler sees, and what stays in the file."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic_core import to_json

from alignkit.components import DataFormat
from alignkit.config import DataConfig
from alignkit.data import sources
from alignkit.data.readers import RawRows
from alignkit.errors import DataError
from alignkit.registry import Registry
from alignkit.rows import Message, Ranking

EXPORTED = ("ranks", "labels")  # the fields that an export adds to a row


class Item(NamedTuple):
    """One row of the samples."""

    row: str  # the row as JSON
    shown: str | None  # as JSON, what a labeler sees if that is not simply the texts of the row
    k: int  # the number of its answers
    digest: bytes  # a hash of the row


class Samples(NamedTuple):
    """A file of samples."""

    items: Iterator[Item]  # read as they are needed
    fingerprint: str  # a hash of the file's bytes


def read(file: Path) -> Samples:
    """Open a file with rows of a prompt and two or more responses, as ``alignkit sample`` writes them.

    Raises:
        DataError: there is no such file. While items are read: a row is bad, or it is ranked already.
    """
    source = sources.open_source(DataConfig(), str(file))
    return Samples(_items(source.rows), source.fingerprint)


def _items(rows: RawRows) -> Iterator[Item]:
    for where, row in rows:
        if isinstance(row, DataError):
            raise row
        yield _item(where, row)


def _item(where: str, row: Mapping[str, Any]) -> Item:
    for field in EXPORTED:
        if row.get(field) is not None:
            raise DataError(f"{where}: the row has '{field}' already. Remove the field to label the row")
    answers = row.get("responses")
    if not row.get("prompt") or not isinstance(answers, list) or len(answers) < 2:
        raise DataError(f"{where}: the row needs a prompt and a list of at least two responses")
    try:
        text = as_json(row)
        shown = None if _is_text(row) else json.dumps(_shown(_ranking(row)), ensure_ascii=False)
    except (DataError, ValueError) as error:  # a ValueError: what JSON or UTF-8 cannot hold
        raise DataError(f"{where}: {error}") from None
    return Item(text, shown, len(answers), digest(text))


def as_json(row: Mapping[str, Any]) -> str:
    """A row as JSON. Pydantic's serializer is several times as fast as Python's."""
    return to_json(row).decode()


def digest(row: str) -> bytes:
    """A hash of a row as JSON."""
    return hashlib.blake2b(row.encode(), digest_size=16).digest()


def _is_text(row: Mapping[str, Any]) -> bool:
    """Whether a row is texts only, which are shown as they are."""
    texts = [row["prompt"], *filter(None, row["responses"])]
    plain = all(isinstance(text, str) and text.strip() for text in texts) and None not in row["responses"]
    return plain and not row.get("tools") and not row.get("functions")


def _ranking(row: Mapping[str, Any]) -> Ranking:
    """The row as the data format ``ranking`` reads it, which the export is later read with."""
    ranking = cast(DataFormat, _registry().get("format", "ranking"))
    return cast(Ranking, ranking.convert({**row, "ranks": [0] * len(row["responses"])}))


def _shown(row: Ranking) -> dict[str, Any]:
    tools = [_message("tools", json.dumps(tool, indent=2, ensure_ascii=False)) for tool in row.tools or []]
    return {"prompt": [*tools, *map(_turn, row.prompt)], "answers": row.answers}


def _turn(turn: Message) -> dict[str, str]:
    """A turn as text: tool calls are shown as JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls", [])]
    return _message(turn["role"], "\n".join([*filter(None, [turn["content"]]), *calls]))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@functools.cache
def _registry() -> Registry:
    return Registry()


def texts(row: str, shown: str | None) -> tuple[list[dict[str, str]], list[str]]:
    """The prompt and the answers that a labeler sees."""
    if shown is not None:
        content = json.loads(shown)
        return content["prompt"], content["answers"]
    content = json.loads(row)
    return [_message("user", content["prompt"])], content["responses"]


def store_file(samples: Path) -> Path:
    """The store beside a file of samples."""
    return samples.with_name(f"{samples.stem}.labels.sqlite")
