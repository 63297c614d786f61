"""A data format: a question and its best answer become a demonstration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit import DataError, DataFormat, Demonstration, fields_of, hookimpl


def convert(row: Mapping[str, Any]) -> Demonstration:
    """Convert one row.

    Raises:
        DataError: a field is not text. alignkit adds the file and the line to the message.
    """
    for name in ("question", "best_answer"):
        if not isinstance(row.get(name), str):
            raise DataError(f"'{name}' is missing or not text")
    return Demonstration(
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["best_answer"]}]
    )


@hookimpl
def alignkit_data() -> list[DataFormat]:
    return [
        DataFormat(
            name="my-thing",
            summary="question, best_answer",
            fits=fields_of("question", "best_answer"),
            convert=convert,
        )
    ]
