"""Rows of Dolly (Databricks 2023, databricks-dolly-15k): ``instruction``, ``response`` and optionally ``context``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit import DataError, DataFormat, Demonstration, Message, fields_of, hookimpl


def convert(row: Mapping[str, Any]) -> Demonstration:
    """Convert one row. The context, if any, follows the instruction after an empty line.

    Raises:
        DataError: the instruction or the response is empty or not text; the context is not text.
    """
    for field in ("instruction", "response"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError(f"'{field}' must be text")
    context = row.get("context")
    if not isinstance(context, str | None):
        raise DataError("'context' must be text")
    question = f"{row['instruction']}\n\n{context}" if context else row["instruction"]
    return Demonstration(
        [Message(role="user", content=question), Message(role="assistant", content=row["response"])],
    )


@hookimpl
def alignkit_data() -> list[DataFormat]:
    return [
        DataFormat(
            name="dolly",
            summary="instruction, response, and optionally context",
            fits=fields_of("instruction", "response"),
            convert=convert,
        )
    ]
