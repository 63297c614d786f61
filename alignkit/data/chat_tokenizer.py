"""A tokenizer with its chat template: conversations to token ids, and sampled answers to text."""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import importlib.metadata
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import alignkit
from alignkit.data import pieces, turns
from alignkit.data.rendering import ChatTemplate
from alignkit.data.special_tokens import MARKUP, SpecialToken, SpecialTokens
from alignkit.errors import DataError
from alignkit.rows import Conversation, Message, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

ANSWERS = "answers"  # the number of turns that were encoded, in notes

_ATTRIBUTE = "alignkit_chat_tokenizer"  # of a tokenizer


def today() -> str:
    """The date in the form that chat templates get: ``2026-11-25``."""
    return datetime.date.today().isoformat()


class ChatTokenizer:
    """A tokenizer with its chat template, the date for the template, and how special tokens in texts are read.

    :func:`attach` adds it to the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str | None, special_tokens: str) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template
        self.template = ChatTemplate(self.source, tokenizer.special_tokens_map, day or today())
        self.special_tokens = special_tokens
        self.special = SpecialTokens(
            {
                str(token): SpecialToken(number, token.lstrip, token.rstrip)
                for number, token in tokenizer.added_tokens_decoder.items()
                if token.special
            }
        )
        self.style = turns.probe(self.renderer())
        eos_token = self.template.named_tokens.get("eos_token")
        self.pieces = pieces.of(tokenizer, f"{self.source}{eos_token}{self._sample()}")

    def _sample(self) -> str:
        """A short rendered conversation; empty if the template rejects it."""
        try:
            return turns.prompt(self.renderer(), self.style, [Message(role="user", content="u")]) + self.style.inner
        except DataError:
            return ""

    def fingerprint(self) -> str:
        """A hash of everything other than messages and tools that token ids depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # written in Python: its state is unknown
            return secrets.token_hex()
        backend.no_truncation()
        backend.no_padding()
        parts = [
            *(alignkit.__version__, importlib.metadata.version("tokenizers"), type(self.tokenizer).__name__),
            *(backend.to_str(), self.source, str(sorted(self.template.named_tokens.items())), self.special_tokens),
            self.template.day if "strftime_now" in self.source else "",
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def escape(self, value: T) -> T:
        """Messages or tools with the special tokens in their texts escaped, unless the user wants them as tokens."""
        return cast(T, self.special.escape(value)) if self.special_tokens == "text" else value

    def renderer(self, tools: Tools | None = None) -> turns.Render:
        """The chat template with these tools."""
        return lambda messages, add_generation_prompt: self.template(messages, add_generation_prompt, tools)

    def ids(self, text: str) -> list[int]:
        """The token ids of a rendered text. The tokenizer adds no tokens to it."""
        if self.special_tokens == "text" and self.special.is_escaped_in(text):
            return self.special.ids(text, self._plain, self._plain_behind)
        return self.pieces.ids(text) if self.pieces else self._tokenize(text)

    def _plain(self, text: str) -> list[int]:
        return self._tokenize(text, split_special_tokens=True)

    @functools.cached_property
    def _plain_behind(self) -> Callable[[str], list[int]]:
        return pieces.plain_behind(self.tokenizer, self._plain)

    def _tokenize(self, text: str, **arguments: Any) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, **arguments)["input_ids"])

    def prompt(self, messages: Conversation, tools: Tools | None = None) -> list[int]:
        """The token ids of a conversation with the generation prompt."""
        return self.ids(self._render_prompt(self.escape(messages), self.escape(tools)))

    def _render_prompt(self, messages: Conversation, tools: Tools | None) -> str:
        prompt = turns.prompt(self.renderer(tools), self.style, messages)
        for tool in tools or []:
            name = str(tool.get("function", tool).get("name"))
            if name not in prompt:
                raise DataError(f"the chat template leaves out the tool '{name}'")
        return prompt

    def turn(
        self,
        messages: Conversation,
        stop_ids: Collection[int],
        notes: Counter[str] | None = None,
        tools: Tools | None = None,
    ) -> tuple[list[int], list[int]]:
        """The token ids of the last turn: those of its prompt, and those of its answer with the token that ends it.

        The special tokens in ``messages`` and ``tools`` must be escaped with :meth:`escape`.
        """
        notes = Counter() if notes is None else notes
        notes[ANSWERS] += 1
        prompt = self._render_prompt(messages[:-1], tools)
        answer = turns.answer(self.renderer(tools), self.style, messages, prompt, notes)
        prompt_ids, all_ids = self.ids(prompt), self.ids(prompt + answer)
        # If the tokenizer would merge the end of the prompt with the answer, the answer is tokenized on its own:
        # sampling begins after the last token of the prompt too.
        continues = all_ids[: len(prompt_ids)] == prompt_ids
        answer_ids = all_ids[len(prompt_ids) :] if continues else self.ids(answer)
        if self.special_tokens == "tokens":
            self._check_end(str(messages[-1]["content"]), stop_ids)
        end = next((index for index, token in enumerate(answer_ids) if token in stop_ids), None)
        if end is None:
            return prompt_ids, [*answer_ids, self.tokenizer.eos_token_id]
        return prompt_ids, answer_ids[: end + 1]

    def _check_end(self, answer: str, stop_ids: Collection[int]) -> None:
        for stop in self.tokenizer.convert_ids_to_tokens(list(stop_ids)):
            if answer.partition(stop)[2].strip():
                raise DataError(f"the answer continues after its end token '{stop}' (data.special_tokens is 'tokens')")

    def text(self, text: str) -> list[int]:
        """The token ids of a plain text, with the tokenizer's first token and one end-of-sequence token.

        A text that spells the first token out has it once, as with the end-of-sequence token.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        split = self.special_tokens == "text"
        ids = list(self.tokenizer(text, split_special_tokens=split)["input_ids"])
        if ids[:2] == [bos, bos] and self.tokenizer("")["input_ids"][:1] == [bos]:
            ids = ids[1:]
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def answer_text(self, answer: Sequence[int]) -> str:
        """The text of a sampled answer, without what the template writes around it.

        If the prompt opens a thought, the text begins with it, so that thought and answer can be told apart. Special
        tokens are left out: as text they would be read as text.
        """
        special = {token.id for text, token in self.special.tokens.items() if text not in MARKUP}
        lead = self.ids(self.style.lead)
        has_lead = bool(lead) and list(answer[: len(lead)]) == lead
        has_end = bool(answer) and answer[-1] in special
        ids = list(answer[len(lead) if has_lead else 0 : len(answer) - has_end])
        if self.special_tokens == "text":
            ids = [token for token in ids if token not in special]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False))
        if has_end:
            text = text.removesuffix(self.special.before_first(self.style.tail))
        if not has_lead and text.startswith(self.style.lead):
            has_lead, text = True, text.removeprefix(self.style.lead)
        return text if has_lead else self.style.opening + text


def attach(tokenizer: PreTrainedTokenizerBase, day: str | None, special_tokens: str) -> PreTrainedTokenizerBase:
    """Add a :class:`ChatTokenizer` to a tokenizer, which is returned. ``day`` None is today."""
    setattr(tokenizer, _ATTRIBUTE, ChatTokenizer(tokenizer, day, special_tokens))
    return tokenizer


def detached(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy without the :class:`ChatTokenizer`, whose compiled template cannot be pickled."""
    bare = copy.copy(tokenizer)
    vars(bare).pop(_ATTRIBUTE, None)
    return bare


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    """The :class:`ChatTokenizer` of a tokenizer. A tokenizer without one gets it, with today's date."""
    chat: ChatTokenizer | None = getattr(tokenizer, _ATTRIBUTE, None)
    if chat is not None and chat.source == tokenizer.chat_template and chat.tokenizer is tokenizer:
        return chat
    day, special_tokens = (chat.template.day, chat.special_tokens) if chat else (None, "text")
    return chat_tokenizer(attach(tokenizer, day, special_tokens))
