"""The prompts of an online stage, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignkit.data.chat_template import prompt_ids
from alignkit.data.encoding import check_fit, encode_each
from alignkit.errors import DataError
from alignkit.protocols import Run
from alignkit.rows import Conversation


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, as messages and as token ids."""

    messages: Conversation
    ids: list[int]


def encode_prompts(run: Run, rows: list[Any]) -> list[EncodedPrompt]:
    """Encode the prompts of ``rows`` and drop duplicates. The first of several equal prompts stays.

    Raises:
        DataError: a prompt is longer than the stage's ``max_prompt_length``.
    """
    table, config = run.config.stage.component.name, run.config.stage.config
    encoded = encode_each(
        run, rows, lambda row, _: EncodedPrompt(row.prompt, prompt_ids(run.tokenizer, row.prompt, row.tools))
    )
    for where, prompt in encoded:
        if len(prompt.ids) > config.max_prompt_length:
            raise DataError(
                f"{where}: the prompt has {len(prompt.ids)} tokens, over {table}.max_prompt_length="
                f"{config.max_prompt_length}. Raise it, or remove the row"
            )
    sequences = ((where, prompt.ids) for where, prompt in encoded)
    check_fit(run, sequences, config.response_length, f"{table}.response_length")
    return list({tuple(prompt.ids): prompt for _, prompt in reversed(encoded)}.values())[::-1]
