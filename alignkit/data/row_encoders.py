"""Encoders for alignkit's types of rows, for :func:`alignkit.data.encoding.encode_rows`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.data.chat_template import IGNORE, encode, encode_answer, prompt_ids
from alignkit.data.chat_tokenizer import attach, chat_tokenizer, detached
from alignkit.rows import Demonstration, Prompt, Ranking, Rated, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS, LISTS_OF_IDS = "list<int32>", "list<list<int32>>"


class TokenEncoder:
    """An encoder with a tokenizer; ``stop_ids`` are the tokens at which an answer ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], **settings: Any) -> None:
        self.tokenizer, self.stop_ids, self.settings = tokenizer, list(stop_ids), settings

    def fingerprint(self) -> str:
        """A hash of everything other than the row that the token ids depend on."""
        return json.dumps([chat_tokenizer(self.tokenizer).fingerprint(), self.stop_ids, self.settings], sort_keys=True)

    def __getstate__(self) -> dict[str, Any]:
        chat = chat_tokenizer(self.tokenizer)
        attached = chat.template.day, chat.special_tokens
        return {**vars(self), "tokenizer": detached(self.tokenizer), "attached": attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        vars(self).update(state)
        attach(self.tokenizer, *attached)


class SequenceEncoder(TokenEncoder):
    """Encodes demonstrations and texts as sequences of at most ``max_length`` tokens with labels.

    Longer sequences are truncated if ``cut`` is set and the loss falls on a token that is left. Otherwise they are
    null. ``length`` is the length before truncation.
    """

    columns: ClassVar[dict[str, str]] = {"input_ids": IDS, "labels": IDS, "length": "int32"}

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], *, max_length: int, cut: bool
    ) -> None:
        super().__init__(tokenizer, stop_ids, max_length=max_length, cut=cut)
        self.max_length, self.cut = max_length, cut

    def __call__(self, row: Demonstration | Text, notes: Counter[str]) -> list[dict[str, Any]]:
        """The sequences of a row: several where the chat template rewrites earlier turns."""
        return [self._record(ids, labels) for ids, labels in encode(self.tokenizer, row, self.stop_ids, notes)]

    def _record(self, ids: list[int], labels: list[int]) -> dict[str, Any]:
        length, labels = len(ids), labels[: self.max_length]
        if length > self.max_length and (not self.cut or all(label == IGNORE for label in labels)):
            return {"input_ids": None, "labels": None, "length": length}
        return {"input_ids": ids[: self.max_length], "labels": labels, "length": length}


class RankingEncoder(TokenEncoder):
    """Encodes rankings and rated answers as a prompt and its answers, each with the token that ends it."""

    columns: ClassVar[dict[str, str]] = {"prompt": IDS, "answers": LISTS_OF_IDS}

    def __call__(self, row: Ranking | Rated, notes: Counter[str]) -> list[dict[str, Any]]:
        """One record."""
        answers = [row.answer] if isinstance(row, Rated) else row.answers
        encoded = [
            encode_answer(self.tokenizer, row.prompt, answer, self.stop_ids, notes, row.tools) for answer in answers
        ]
        start = encoded[0][1]  # the prompt is the same for all of them
        return [{"prompt": encoded[0][0][:start], "answers": [ids[start:] for ids, _ in encoded]}]


class PromptEncoder(TokenEncoder):
    """Encodes prompts, and those of rankings, with the generation prompt."""

    columns: ClassVar[dict[str, str]] = {"prompt": IDS}

    def __call__(self, row: Prompt | Ranking, notes: Counter[str]) -> list[dict[str, Any]]:
        """One record."""
        return [{"prompt": prompt_ids(self.tokenizer, row.prompt, row.tools)}]
