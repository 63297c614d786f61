"""Reads files of samples: rows with a prompt and answers to it, as ``alignkit sample`` writes them. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic_core import to_json

from alignkit.components import DataFormat
from alignkit.data.prompts import has_tools
from alignkit.data.readers import READERS, kind_of, rows_of
from alignkit.errors import DataError, one_line, suggestion
from alignkit.registry import Registry
from alignkit.rows import Conversation, Prompt


class Item(NamedTuple):
    """A prompt and answers to compare."""

    prompt: Conversation
    answers: Sequence[str]
    fields: Mapping[str, Any] | None = None  # the other fields of the row, for scorers


class Sample(NamedTuple):
    """A row of a file of samples."""

    row: dict[str, Any]  # as JSON holds it
    item: Item

    @property
    def ranks(self) -> list[float | None] | None:
        """The ranks of the answers that the file has: lower is better, None is no rank."""
        return self.row.get("ranks")


def read_samples(file: Path) -> list[Sample]:
    """The rows of a file of samples.

    Raises:
        DataError: there is no such file, or it has no rows; a row has no answers, ranks that do not fit them, or
            a prompt that is invalid or has tools, or a value that JSON cannot represent.
    """
    if not file.is_file():
        raise DataError(suggestion(f"no file {file}", file.name, [each.name for each in file.parent.glob("*")]))
    if kind_of(file) is None:
        raise DataError(f"{file}: data files must end in {', '.join(READERS)}")
    prompts = cast(DataFormat, Registry().get("format", "prompts"))
    samples = []
    for where, row in rows_of(file):
        if isinstance(row, DataError):
            raise row
        prompt, answers, ranks = row.get("prompt"), row.get("responses"), row.get("ranks")
        if not isinstance(answers, list) or not answers or not prompt:
            raise DataError(f"{where}: the row needs a prompt and a list of responses")
        if not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{where}: a response is not a string")
        fits = isinstance(ranks, list) and len(ranks) == len(answers) and all(map(_is_rank, ranks))
        if ranks is not None and not fits:
            raise DataError(f"{where}: ranks must be a list with a number or null for each response")
        try:
            asked = cast(Prompt, prompts.convert(row))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if has_tools(asked):
            raise DataError(f"{where}: the prompt has tools, which judges and scorers do not see. Remove the row")
        try:
            plain = json.loads(to_json(row, inf_nan_mode="null"))  # Parquet has times, and NaN
        except ValueError as error:
            raise DataError(f"{where}: {one_line(error)}") from None
        samples.append(Sample(plain, Item(asked.prompt, answers, asked.fields)))
    if not samples:
        raise DataError(f"{file} has no rows")
    return samples


def _is_rank(rank: Any) -> bool:
    return rank is None or (isinstance(rank, int | float) and not isinstance(rank, bool) and math.isfinite(rank))
