"""From conversations to token ids: the one place that decides what an answer is and where it ends.

Training, sampling and scoring agree by construction. A turn's ids are those of its prompt, which is where sampling
begins, then those of its answer up to the first token at which sampling stops (:mod:`alignkit.data.turns` finds both in
what the chat template writes). Turns share a row where each prompt continues the turn before it; where a template
rewrites earlier turns they become a row each. Which tokens are learnt is a matter of lengths, never of token identity,
so that a tokenizer whose pad token is its end-of-sequence token learns to end all the same.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import importlib.metadata
import secrets
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import alignkit
from alignkit import paths
from alignkit.data import pieces, turns
from alignkit.data.rendering import ChatTemplate
from alignkit.data.special_tokens import MARKUP, SetApart, Special
from alignkit.errors import AlignkitError, DataError, one_line
from alignkit.rows import Conversation, Demonstration, Message, Text, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

IGNORE = -100  # the label of tokens that are not learnt

# For base models without a template of their own. It is saved with the tokenizer.
#
#     User: How do I boil an egg?
#     Assistant: Ten minutes in boiling water.<eos>
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def load_tokenizer(
    base: str, template: str | None, day: str | None = None, special_tokens: str = "text"
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``base``, with a chat template (``template``'s file, its own, or the plain one) and a pad token.

    The pad token is another than the end-of-sequence token wherever the tokenizer has a spare one. ``day`` is the one
    (``2026-11-25``) that templates get which ask for the date; None is the day of this call. ``special_tokens`` is
    :attr:`alignkit.config.DataConfig.special_tokens`.

    Raises:
        AlignkitError: no tokenizer there; no end-of-sequence token; the template's file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # missing files, hub errors and converter errors share no base class
        raise AlignkitError(f"no tokenizer could be loaded from {base}: {one_line(error)}") from error
    if tokenizer.eos_token is None:
        raise AlignkitError(f"the tokenizer of {base} has no end-of-sequence token, so no answer could ever end")
    if template is not None:
        try:
            tokenizer.chat_template = paths.expand(template).read_text(encoding="utf-8")
        except OSError as error:
            raise AlignkitError(f"chat_template {template} cannot be read: {error}") from None
    elif tokenizer.chat_template is None:
        begins_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos else "") + PLAIN
    elif isinstance(tokenizer.chat_template, dict):  # several, by name
        if "default" not in tokenizer.chat_template:
            named = ", ".join(tokenizer.chat_template)
            raise AlignkitError(
                f"{base} has several chat templates ({named}) and no default: set chat_template to a file"
            )
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = pad_token(tokenizer)
    return with_writer(tokenizer, day, special_tokens)


def today() -> str:
    """The date as chat templates get it: ``2026-11-25``."""
    return datetime.date.today().isoformat()


def tokenizer_of_run(folder: Path, record: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in a finished run's folder, writing conversations as in that run: ``record`` is its manifest."""
    data = record["config"]["stages"][record["stage"]]["data"]
    return load_tokenizer(str(folder), None, record.get("today"), data.get("special_tokens", "text"))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token other than the one that ends an answer, where the tokenizer has one.

    Masks come from lengths here, so any token would do for training; but plain Transformers looks for the last token
    that is no padding to find where a scored text ends.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [token for token in special if token not in (tokenizer.eos_token, tokenizer.bos_token)]
    named = [token for name in ("pad", "unk", "endoftext", "reserved") for token in special if name in token.lower()]
    return (named or [str(tokenizer.eos_token)])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, tools: Tools | None = None) -> list[int]:
    """The ids of a conversation up to where the assistant begins to answer; ``tools`` are those that it may call."""
    return writer(tokenizer).prompt(prompt, tools)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    row: Demonstration | Text,
    stop_ids: Collection[int],
    notes: Counter[str] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of a row, both ``[T]``; labels are :data:`IGNORE` where nothing is learnt.

    A demonstration is learnt on its assistant turns of weight 1, each with the token that ends it, and is several
    sequences where the chat template rewrites earlier turns. A text is learnt whole, with an end-of-sequence token
    after it. ``stop_ids`` are the tokens at which generation stops. ``notes`` counts what has to be reported, by what
    it says.

    Raises:
        DataError: the chat template refuses the conversation or cannot keep all of it.
    """
    if isinstance(row, Text):
        ids = writer(tokenizer).text(row.text)
        return [(ids, [IGNORE, *ids[1:]])]  # nothing predicts the first token

    found: list[tuple[list[int], list[int]]] = []
    known = writer(tokenizer)
    messages, tools = known.hide(row.messages), known.hide(row.tools)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            prompt, answer = known.turn(messages[: turn + 1], stop_ids, notes, tools)
            labels = [IGNORE] * len(prompt)
            if found and prompt[: len(found[-1][0])] == found[-1][0]:
                former = found.pop()[1]
                labels[: len(former)] = former
            found.append(([*prompt, *answer], [*labels, *answer]))
    if notes is not None and len(found) > 1:
        notes[SPLIT] += 1
    return found


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str | Message,
    stop_ids: Collection[int],
    notes: Counter[str] | None = None,
    tools: Tools | None = None,
) -> tuple[list[int], int]:
    """The ids of a prompt and an answer, with the token that ends it, and where the answer begins.

    An answer with tool calls is a message. The prompt's ids are those of :func:`prompt_ids`, the whole those of
    :func:`encode`.
    """
    turn = Message(role="assistant", content=answer) if isinstance(answer, str) else answer
    known = writer(tokenizer)
    before, ids = known.turn(known.hide([*prompt, turn]), stop_ids, notes, known.hide(tools))
    return [*before, *ids], len(before)


def answer_text(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    """A sampled answer as text, for which :func:`encode_answer` gives these ids again, as far as text can say them."""
    return writer(tokenizer).answer_text(answer)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, tools: Tools | None = None
) -> list[int]:
    """The ids of a whole conversation just as its template writes it, for models that someone else trained on that."""
    known = writer(tokenizer)
    return known.ids(known.template(known.hide(messages), False, known.hide(tools)))


def turn_end(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> int | None:
    """The special token with which the chat template ends a turn; None where it writes none.

    What it writes only after the last turn of a conversation does not count, unless there is nothing else: Phi-3's ends
    turns with ``<|end|>``, and conversations with ``<|endoftext|>`` too. One of ``stop_ids`` comes first.
    """
    known = writer(tokenizer)
    last, inner = (known.ids(text) for text in (known.style.tail, known.style.inner))
    every = last[: turns.common_prefix(last, inner)]
    special = {token.id for token in known.apart.special.values()}
    candidates = [token for token in every if token in special][::-1] or [token for token in last if token in special]
    return next((token for token in [*every, *candidates] if token in stop_ids), candidates[0] if candidates else None)


_WRITER = "alignkit_writer"  # the attribute of a tokenizer that holds its Writer
ANSWERS = "answers"  # the number of turns that were encoded, in notes
SPLIT = "rows are split into one row a turn, since the chat template rewrites earlier turns"


class Writer:
    """A tokenizer with its chat template, and what its templates are told beside the conversation.

    Set on the tokenizer by :func:`load_tokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str | None, special_tokens: str) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template
        self.template = ChatTemplate(self.source, tokenizer.special_tokens_map, day or today())
        self.special_tokens = special_tokens
        self.apart = SetApart(
            {
                str(token): Special(number, token.lstrip, token.rstrip)
                for number, token in tokenizer.added_tokens_decoder.items()
                if token.special
            }
        )
        self.style = turns.probe(self.renderer())
        self.pieces = pieces.of(
            tokenizer, f"{self.source}{self.template.named_tokens.get('eos_token')}{self._sample()}"
        )

    def _sample(self) -> str:
        """A short conversation as the template writes it; nothing where it refuses it."""
        try:
            return turns.prompt(self.renderer(), self.style, [Message(role="user", content="u")]) + self.style.inner
        except DataError:
            return ""

    def fingerprint(self) -> str:
        """What the token ids of a conversation depend on beside its messages and tools."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer written in Python: its class may hold anything
            return secrets.token_hex()
        backend.no_truncation()
        backend.no_padding()
        parts = [
            *(alignkit.__version__, importlib.metadata.version("tokenizers"), type(self.tokenizer).__name__),
            *(backend.to_str(), self.source, str(sorted(self.template.named_tokens.items())), self.special_tokens),
            self.template.day if "strftime_now" in self.source else "",
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def hide(self, value: T) -> T:
        """Messages or tools with the special tokens of their own texts set apart, unless those are to be tokens."""
        return cast(T, self.apart.hide(value)) if self.special_tokens == "text" else value

    def renderer(self, tools: Tools | None = None) -> turns.Render:
        """The chat template with these tools."""
        return lambda messages, add_generation_prompt: self.template(messages, add_generation_prompt, tools)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, to which the tokenizer adds nothing."""
        if self.apart.is_in(text):
            return self.apart.ids(text, lambda part: self._tokenize(part, split_special_tokens=True))
        return self.pieces.ids(text) if self.pieces else self._tokenize(text)

    def _tokenize(self, text: str, **how: Any) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, **how)["input_ids"])

    def prompt(self, messages: Conversation, tools: Tools | None = None) -> list[int]:
        """The ids of a conversation up to where the assistant begins to answer."""
        return self.ids(self._before(self.hide(messages), self.hide(tools)))

    def _before(self, messages: Conversation, tools: Tools | None) -> str:
        before = turns.prompt(self.renderer(tools), self.style, messages)
        for tool in tools or []:
            name = str(tool.get("function", tool).get("name"))
            if name not in before:
                raise DataError(f"the chat template leaves out the tool '{name}'")
        return before

    def turn(
        self,
        messages: Conversation,
        stop_ids: Collection[int],
        notes: Counter[str] | None = None,
        tools: Tools | None = None,
    ) -> tuple[list[int], list[int]]:
        """The ids of the last turn of a conversation: its prompt, and its answer with the token that ends it.

        The special tokens in the messages and tools are set apart already, by :meth:`hide`.
        """
        notes = Counter() if notes is None else notes
        notes[ANSWERS] += 1
        before = self._before(messages[:-1], tools)
        answer = turns.answer(self.renderer(tools), self.style, messages, before, notes)
        prompt, whole = self.ids(before), self.ids(before + answer)
        # sampling begins after the prompt's last token, and so does training where a tokenizer would merge it
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.ids(answer)
        if self.special_tokens == "tokens":
            self._refuse_an_early_end(str(messages[-1]["content"]), stop_ids)
        end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
        return prompt, [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    def _refuse_an_early_end(self, answer: str, stop_ids: Collection[int]) -> None:
        for stop in self.tokenizer.convert_ids_to_tokens(list(stop_ids)):
            if answer.partition(stop)[2].strip():
                raise DataError(f"the answer goes on after '{stop}', which ends it (data.special_tokens is 'tokens')")

    def text(self, text: str) -> list[int]:
        """The ids of a plain text, begun as the tokenizer begins one, with one end-of-sequence token after it."""
        eos = self.tokenizer.eos_token_id
        split = self.special_tokens == "text"
        ids = list(self.tokenizer(text, split_special_tokens=split)["input_ids"])
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def answer_text(self, answer: Sequence[int]) -> str:
        """A sampled answer as text, without what the template itself writes around one.

        It begins with the thought that the prompt opened, so that it says by itself what is thought and what is said.
        Special tokens are left out, since as text they would be text.
        """
        special = {token.id for text, token in self.apart.special.items() if text not in MARKUP}
        lead = self.ids(self.style.lead)
        led = bool(lead) and list(answer[: len(lead)]) == lead
        ended = bool(answer) and answer[-1] in special
        ids = list(answer[len(lead) if led else 0 : len(answer) - ended])
        if self.special_tokens == "text":
            ids = [token for token in ids if token not in special]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False))
        if ended:
            text = text.removesuffix(self.apart.plain_start(self.style.tail))
        if not led and text.startswith(self.style.lead):
            led, text = True, text.removeprefix(self.style.lead)
        return text if led else self.style.opening + text


def with_writer(tokenizer: PreTrainedTokenizerBase, day: str | None, special_tokens: str) -> PreTrainedTokenizerBase:
    """The tokenizer, which writes conversations with this day, and special tokens in texts in this way."""
    setattr(tokenizer, _WRITER, Writer(tokenizer, day, special_tokens))
    return tokenizer


def without_writer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that can be pickled, for :func:`with_writer`."""
    bare = copy.copy(tokenizer)
    vars(bare).pop(_WRITER, None)
    return bare


def writer(tokenizer: PreTrainedTokenizerBase) -> Writer:
    """The writer of a tokenizer; one that asks for today's date where the tokenizer has none yet."""
    known: Writer | None = getattr(tokenizer, _WRITER, None)
    if known is not None and known.source == tokenizer.chat_template and known.tokenizer is tokenizer:
        return known
    day, special_tokens = (known.template.day, known.special_tokens) if known else (None, "text")
    with_writer(tokenizer, day, special_tokens)
    return writer(tokenizer)
