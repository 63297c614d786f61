"""The prompts of an online stage, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.encoding import check_column_fits, encode_rows, ids_key
from alignkit.data.row_encoders import PromptEncoder
from alignkit.data.spool import Mapped, copies
from alignkit.errors import DataError
from alignkit.protocols import Run
from alignkit.rows import Conversation, Located


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, as messages and as token ids."""

    messages: Conversation
    ids: list[int]
    fields: Mapping[str, Any]  # the other fields of its row


def encode_prompts(run: Run, rows: Sequence[Located]) -> Sequence[EncodedPrompt]:
    """Encode the prompts of ``rows`` and drop duplicates. The first of several equal prompts stays.

    A prompt stays more than once if a weight in ``data.path`` repeats its row.

    Raises:
        DataError: a prompt is longer than the stage's ``max_prompt_length``.
    """
    if not rows:
        return []
    table, config = run.config.stage.component.name, run.config.stage.config
    encoded = encode_rows(run, rows, PromptEncoder(run.tokenizer, run.stop_ids))
    too_long: tuple[int, int] | None = None  # the first record over the limit, and its tokens
    copy_of = copies(encoded.rows)
    distinct: dict[tuple[bytes, int], int] = {}  # the first record of each prompt and copy
    for record in reversed(encoded.good()):
        ids = encoded.ids("prompt", record)
        distinct[ids_key(ids), copy_of[encoded.number(record)]] = record
        if len(ids) > config.max_prompt_length:
            too_long = record, len(ids)
    if too_long is not None:
        raise DataError(
            f"{encoded.where(too_long[0])}: the prompt has {too_long[1]} tokens, over {table}.max_prompt_length="
            f"{config.max_prompt_length}. Raise it, or remove the row"
        )
    check_column_fits(run, encoded, "prompt", config.response_length, f"{table}.response_length")

    def prompt(record: int) -> EncodedPrompt:
        row: Any = encoded.located(record).row
        return EncodedPrompt(row.prompt, encoded.ids("prompt", record), getattr(row, "fields", {}))

    return Mapped(prompt, list(distinct.values())[::-1])
