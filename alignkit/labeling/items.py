"""The rows of a file of samples as items to label: what a labeler sees, and what stays in the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from alignkit.components import DataFormat
from alignkit.config import DataConfig
from alignkit.data import sources
from alignkit.errors import ConfigError, DataError
from alignkit.registry import Registry
from alignkit.rows import Message, Ranking

EXPORTED = ("ranks", "labels")  # the fields that an export adds to a row


class Item(NamedTuple):
    """One row of the samples."""

    row: str  # the row as JSON
    shown: str | None  # as JSON, what a labeler sees if that is not simply the texts of the row
    k: int  # the number of its answers

    @property
    def digest(self) -> bytes:
        """A hash of the row."""
        return hashlib.blake2b(self.row.encode(), digest_size=16).digest()


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


def _items(rows: sources.RawRows) -> Iterator[Item]:
    ranking = cast(DataFormat, Registry().get("format", "ranking"))
    for where, row in rows:
        if isinstance(row, DataError):
            raise row
        yield _item(where, row, ranking.convert)


def _item(where: str, row: Mapping[str, Any], convert: Callable[..., Any]) -> Item:
    for field in EXPORTED:
        if row.get(field) is not None:
            raise DataError(f"{where}: the row has '{field}' already. Remove the field to label the row")
    answers = row.get("responses")
    if not row.get("prompt") or not isinstance(answers, list) or len(answers) < 2:
        raise DataError(f"{where}: the row needs a prompt and a list of at least two responses")
    try:
        converted = cast(
            Ranking, convert({**row, "ranks": [0] * len(answers)})
        )  # what a reward model is later trained on
        text = json.dumps(row, ensure_ascii=False)
        text.encode()
    except (DataError, TypeError, ValueError) as error:  # also what JSON or UTF-8 cannot hold
        raise DataError(f"{where}: {error}") from None
    is_text = isinstance(row["prompt"], str) and all(isinstance(answer, str) for answer in answers)
    shown = None if is_text and not converted.tools else json.dumps(_shown(converted), ensure_ascii=False)
    return Item(text, shown, len(answers))


def _shown(row: Ranking) -> dict[str, Any]:
    tools = [_message("tools", json.dumps(tool, indent=2, ensure_ascii=False)) for tool in row.tools or []]
    return {"prompt": [*tools, *map(_turn, row.prompt)], "answers": row.answers}


def _turn(turn: Message) -> dict[str, str]:
    """A turn as text: tool calls are shown as JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls", [])]
    return _message(turn["role"], "\n".join([*filter(None, [turn["content"]]), *calls]))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def texts(row: str, shown: str | None) -> tuple[list[dict[str, str]], list[str]]:
    """The prompt and the answers that a labeler sees."""
    if shown is not None:
        content = json.loads(shown)
        return content["prompt"], content["answers"]
    content = json.loads(row)
    return [_message("user", content["prompt"])], content["responses"]


def store_file(samples: Path) -> Path:
    """The store beside a file of samples."""
    if not samples.name:
        raise ConfigError("the name of the samples is empty")
    return samples.with_name(f"{samples.stem}.labels.sqlite")
