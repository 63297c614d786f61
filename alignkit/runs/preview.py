"""Tries the chat template on the rows before anything is loaded, so that ``check`` finds the rows that it refuses.

This needs neither torch nor Transformers: the template is rendered by :mod:`alignkit.data.rendering`, and tokens are
counted by the ``tokenizers`` library. Where the tokenizer's files are not on this disk, the rows are checked when
training starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from alignkit import bundled
from alignkit.config import RunConfig
from alignkit.data import Located
from alignkit.data.chat_template import PLAIN, encode, encode_answer, prompt_ids
from alignkit.errors import DataError
from alignkit.rows import Demonstration, Prompt, Ranking, Row, Text
from alignkit.runs import base

ROWS = 2000  # that are tried; the others are checked when training starts


def bad_rows(config: RunConfig, folder: Path, tokenizer: Tokenizer, rows: list[Located]) -> dict[str, str]:
    """The rows that the chat template refuses or the model cannot read: location -> reason.

    ``folder`` is that of the model, or of the run that this one starts from; ``tokenizer`` was read from it.

    Raises:
        DataError: rows are longer than the stage's ``max_length``, and ``too_long`` is ``error``.
    """
    limits, settings = base.limits(str(folder)), config.stage.config
    positions = limits.positions if limits.learnt else None
    stage, longest, over = config.stage.component.name, getattr(settings, "max_length", None), list[tuple[int, str]]()
    found, total = dict[str, str](), 0
    for where, row in rows[:ROWS]:
        if isinstance(row, Ranking) and Prompt in config.stage.component.rows:  # the stage samples its own answers
            row = Prompt(row.prompt, row.tools)
        try:
            lengths = [len(ids) for ids in _sequences(tokenizer, row)]
        except DataError as error:
            found[where] = f"{where}: {error}"
            continue
        total += len(lengths)
        if isinstance(row, Prompt):
            _check_prompt(settings, lengths[0], where, stage, positions)
        elif longest is not None and max(lengths, default=0) > longest:
            over += [(length, where) for length in lengths if length > longest]
        elif positions is not None and max(lengths, default=0) > positions:
            raise DataError(f"{where}: {max(lengths)} tokens are more than the {positions} positions of the model")
    if over and getattr(settings, "too_long", None) == "error":
        what = "answers" if isinstance(rows[0].row, Ranking) else "rows"
        choices = [each for each in get_args(get_type_hints(type(settings))["too_long"]) if each != "error"]
        raise DataError(
            f"{len(over)} of {total} {what} are over {longest} tokens, the longest {max(over)[0]} "
            f"({max(over)[1]}). Raise {stage}.max_length, or set {stage}.too_long={' or '.join(choices)}"
        )
    return found


def _check_prompt(settings: Any, length: int, where: str, stage: str, positions: int | None) -> None:
    """Whether a prompt is one that the stage takes, and leaves room for the answer that is sampled after it."""
    longest, room = getattr(settings, "max_prompt_length", None), getattr(settings, "response_length", 0)
    if longest is not None and length > longest:
        raise DataError(
            f"{where}: the prompt has {length} tokens, over {stage}.max_prompt_length={longest}. Raise it, or remove "
            "the row"
        )
    if positions is not None and length + room > positions:
        raise DataError(
            f"{where}: {length + room} tokens with {stage}.response_length={room} are more than the {positions} "
            f"positions of the model. Shorten the row, or lower {stage}.response_length"
        )


def folder_of(config: RunConfig) -> Path | None:
    """The folder of a config's model, where it is on this disk."""
    if not config.model.startswith(bundled.PREFIX):
        return base.folder_of(base.locate(config.model, print))
    folder = bundled.model(config.model)
    return folder if folder.is_dir() else None


def _sequences(tokenizer: Tokenizer, row: Row) -> list[list[int]]:
    known, stop_ids = cast(Any, tokenizer), [tokenizer.eos_token_id]
    if isinstance(row, Demonstration | Text):
        return [ids for ids, _ in encode(known, row, stop_ids)]
    if isinstance(row, Ranking):
        return [encode_answer(known, row.prompt, answer, stop_ids, tools=row.tools)[0] for answer in row.answers]
    return [prompt_ids(known, row.prompt, row.tools)] if isinstance(row, Prompt) else []


class Tokenizer:
    """What :mod:`alignkit.data.chat_template` asks of a tokenizer, from the files in a model's folder."""

    def __init__(self, backend: Any, config: dict[str, Any], template: str | None) -> None:
        self.backend = backend
        named = {name: token for name, token in config.items() if name.endswith("_token")}
        named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        self.special_tokens_map = {name: token for name, token in named.items() if isinstance(token, str)}
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self.eos_token = self.special_tokens_map.get("eos_token", "")
        self.eos_token_id = backend.token_to_id(self.eos_token)
        bos = backend.token_to_id(self.special_tokens_map.get("bos_token", ""))
        begins_with_bos = bos is not None and self("a")["input_ids"][:1] == [bos]
        self.chat_template = template or ("{{ bos_token }}" if begins_with_bos else "") + PLAIN

    @classmethod
    def read(cls, folder: Path, template: str | None) -> Tokenizer | None:
        """The tokenizer in a folder, with the template in a file of the user's; None where it is of another kind."""
        import tokenizers

        if not (folder / "tokenizer.json").exists() or not (folder / "tokenizer_config.json").exists():
            return None
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        own = folder / "chat_template.jinja"
        source = config.get("chat_template")
        for file in (own, *([Path(template).expanduser()] if template else [])):
            source = file.read_text(encoding="utf-8") if file.exists() else source
        if not isinstance(source, str | None) or not config.get("eos_token"):  # several templates by name
            return None
        return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config, source)

    def __call__(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        """As a tokenizer of Transformers."""
        self.backend.encode_special_tokens = split_special_tokens
        return {"input_ids": self.backend.encode(text, add_special_tokens=add_special_tokens).ids}
