"""Applies the chat template to the rows before a model is loaded, so that ``check`` reports the rows that it rejects.

This needs neither torch nor Transformers: :mod:`alignkit.data.rendering` renders the template, and the ``tokenizers``
library counts tokens. If the files of the tokenizer are not on this disk, the rows are checked when training starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from alignkit import protocols
from alignkit.config.resolve import RunConfig
from alignkit.config.settings import Selected
from alignkit.data.chat_template import PLAIN, encode, encode_answer, prompt_ids
from alignkit.errors import DataError
from alignkit.rows import Demonstration, Located, Prompt, Ranking, Rated, Row, Text
from alignkit.runs import base

ROWS = 2000  # the others are checked when training starts


def bad_rows(config: RunConfig, folder: Path, tokenizer: Tokenizer, rows: Sequence[Located]) -> dict[str, str]:
    """The rows that the chat template refuses or the model cannot read: location -> reason.

    ``folder`` is that of the model, or of the run that this one starts from; ``tokenizer`` was read from it.

    Raises:
        DataError: rows are longer than the stage's ``max_length``, and ``too_long`` is ``error``.
    """
    limits, settings = base.limits(str(folder)), config.stage.config
    positions = limits.positions if limits.learnt else None
    stage, max_length = config.stage.component.name, getattr(settings, "max_length", None)
    bad, too_long, total = dict[str, str](), list[tuple[int, str]](), 0
    for where, row in rows[:ROWS]:
        row = _as_read(config, row)
        try:
            lengths = [len(ids) for ids in _sequences(tokenizer, row)]
        except DataError as error:
            bad[where] = f"{where}: {error}"
            continue
        total += len(lengths)
        if isinstance(row, Prompt):
            _check_prompt(settings, lengths[0], where, stage, positions)
        elif max_length is not None and max(lengths, default=0) > max_length:
            too_long += [(length, where) for length in lengths if length > max_length]
        elif positions is not None and max(lengths, default=0) > positions:
            raise DataError(f"{where}: {max(lengths)} tokens are more than the {positions} positions of the model")
    if too_long and getattr(settings, "too_long", None) == "error":
        noun = "answers" if isinstance(rows[0].row, Ranking | Rated) else "rows"
        choices = [each for each in get_args(get_type_hints(type(settings))["too_long"]) if each != "error"]
        raise DataError(
            f"{len(too_long)} of {total} {noun} are over {max_length} tokens, the longest {max(too_long)[0]} "
            f"({max(too_long)[1]}). Raise {stage}.max_length, or set {stage}.too_long={' or '.join(choices)}"
        )
    return bad


def without_fields(rewards: Sequence[Selected], rows: Sequence[Located]) -> dict[str, str]:
    """The rows without a field that a reward reads, or with a blank one: location -> reason."""
    reads = {field: reward.component.name for reward in rewards for field in reward.component.fields}
    bad = {}
    for where, row in rows if reads else ():
        for field, reward in reads.items():
            value = getattr(row, "fields", {}).get(field)
            if value is None or (isinstance(value, str) and not value.strip()):
                bad[where] = f"{where}: reward '{reward}' needs the field '{field}'"
    return bad


def _check_prompt(settings: Any, length: int, where: str, stage: str, positions: int | None) -> None:
    """Check the length of a prompt, and that the model can read it with a sampled answer."""
    limit, response = getattr(settings, "max_prompt_length", None), getattr(settings, "response_length", 0)
    if limit is not None and length > limit:
        raise DataError(
            f"{where}: the prompt has {length} tokens, over {stage}.max_prompt_length={limit}. Raise it, or remove "
            "the row"
        )
    if positions is not None and length + response > positions:
        raise DataError(
            f"{where}: {length + response} tokens with {stage}.response_length={response} are more than the "
            f"{positions} positions of the model. Shorten the row, or lower {stage}.response_length"
        )


def lengths_of(config: protocols.RunConfig, tokenizer: Any, row: Row) -> list[int]:
    """The number of tokens of each sequence that a run reads of a row, such as an answer with its prompt.

    Empty for a row of a plugin's own type.

    Raises:
        DataError: the chat template rejects the row.
    """
    return [len(ids) for ids in _sequences(tokenizer, _as_read(config, row))]


def _as_read(config: protocols.RunConfig, row: Row) -> Row:
    """A row as the stage reads it: of a ranking, one that samples its own answers reads the prompt only."""
    if isinstance(row, Ranking) and Prompt in config.stage.component.rows:
        return Prompt(row.prompt, row.tools)
    return row


def _sequences(tokenizer: Tokenizer, row: Row) -> list[list[int]]:
    known, stop_ids = cast(Any, tokenizer), [tokenizer.eos_token_id]
    if isinstance(row, Demonstration | Text):
        return [ids for ids, _ in encode(known, row, stop_ids)]
    if isinstance(row, Ranking):
        return [encode_answer(known, row.prompt, answer, stop_ids, tools=row.tools)[0] for answer in row.answers]
    if isinstance(row, Rated):
        return [encode_answer(known, row.prompt, row.answer, stop_ids, tools=row.tools)[0]]
    return [prompt_ids(known, row.prompt, row.tools)] if isinstance(row, Prompt) else []


class Tokenizer:
    """A tokenizer without Transformers, with the interface that :mod:`alignkit.data.chat_template` needs."""

    is_only_backend = True  # see :mod:`alignkit.data.pieces`
    split_special_tokens = False

    def __init__(self, backend: Any, config: dict[str, Any], template: str | None) -> None:
        self.backend_tokenizer = backend
        special = {name: token for name, token in config.items() if name.endswith("_token")}
        special = {name: token.get("content") if isinstance(token, dict) else token for name, token in special.items()}
        self.special_tokens_map = {name: token for name, token in special.items() if isinstance(token, str)}
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self.eos_token = self.special_tokens_map.get("eos_token", "")
        self.eos_token_id = backend.token_to_id(self.eos_token)
        self.bos_token_id = backend.token_to_id(self.special_tokens_map.get("bos_token", ""))
        begins_with_bos = self.bos_token_id is not None and self("a")["input_ids"][:1] == [self.bos_token_id]
        self.chat_template = template or ("{{ bos_token }}" if begins_with_bos else "") + PLAIN

    @classmethod
    def read(cls, folder: Path, template: str | None) -> Tokenizer | None:
        """Read the tokenizer in a folder, with the user's template. None if its files are of another kind."""
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
        """As with a tokenizer of Transformers."""
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}
