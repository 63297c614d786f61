"""From conversations to token ids and labels. Only this module decides what an answer is, and where it ends.

Training, sampling and scoring therefore use the same tokens. A turn consists of its prompt, after which sampling
begins, and of its answer up to the first token at which sampling stops (:mod:`alignkit.data.turns` finds both in the
rendered conversation). Turns are in one sequence if each prompt continues the turn before it. If a chat template
rewrites earlier turns, each turn is a sequence. Labels depend on positions, never on the value of a token: if the pad
token is also the end-of-sequence token, the model still learns to end its answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import paths
from alignkit.data import turns
from alignkit.data.chat_tokenizer import attach, chat_tokenizer
from alignkit.errors import AlignkitError, one_line
from alignkit.rows import Conversation, Demonstration, Message, Text, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of tokens that are not trained on
SPLIT = "rows are split into one row a turn, since the chat template rewrites earlier turns"  # a note

# For base models without a chat template. It is saved with the tokenizer.
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
    base: str,
    template: str | None,
    day: str | None = None,
    special_tokens: str = "text",
    kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``base``, with a chat template (``template``'s file, its own, or the plain one) and a pad token.

    The pad token differs from the end-of-sequence token if the tokenizer has another special token. ``day``
    (``2026-11-25``, by default today) is for templates that write the date. ``special_tokens`` is
    :attr:`alignkit.config.DataConfig.special_tokens`. ``kwargs`` are arguments of ``from_pretrained``.

    Raises:
        AlignkitError: there is no tokenizer, it has no end-of-sequence token, or the template's file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        kwargs = {"trust_remote_code": False, **(kwargs or {})}  # None would ask
        tokenizer = AutoTokenizer.from_pretrained(base, **kwargs)
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
    return attach(tokenizer, day, special_tokens)


def tokenizer_of_run(folder: Path, record: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a finished run, with the run's date and settings; ``record`` is the run's manifest."""
    data = record["config"]["stages"][record["stage"]]["data"]
    return load_tokenizer(str(folder), None, record.get("today"), data.get("special_tokens", "text"))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token for padding; the end-of-sequence token if there is no other.

    Training masks padding by length, so any token would do. But a reward model in plain Transformers finds the end of a
    text by its last token that is not padding.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [token for token in special if token not in (tokenizer.eos_token, tokenizer.bos_token)]
    named = [token for name in ("pad", "unk", "endoftext", "reserved") for token in special if name in token.lower()]
    return (named or [str(tokenizer.eos_token)])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, tools: Tools | None = None) -> list[int]:
    """The token ids of a conversation with the generation prompt; ``tools`` are those that the model may call."""
    return chat_tokenizer(tokenizer).prompt(prompt, tools)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    row: Demonstration | Text,
    stop_ids: Collection[int],
    notes: Counter[str] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of a row, each [T]; a label is :data:`IGNORE` where the loss does not fall.

    In a demonstration, the loss falls on the assistant turns of weight 1, each with the token that ends it. It is
    several sequences if the chat template rewrites earlier turns. In a text, the loss falls on all tokens and on an
    end-of-sequence token after them.

    Args:
        stop_ids: the tokens at which generation stops.
        notes: counts messages for the user.

    Raises:
        DataError: the chat template rejects the conversation or leaves out a part of it.
    """
    chat = chat_tokenizer(tokenizer)
    if isinstance(row, Text):
        ids = chat.text(row.text)
        return [(ids, [IGNORE, *ids[1:]])]  # nothing predicts the first token

    sequences: list[tuple[list[int], list[int]]] = []
    messages, tools = chat.escape(row.messages), chat.escape(row.tools)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            prompt, answer = chat.turn(messages[: turn + 1], stop_ids, notes, tools)
            labels = [IGNORE] * len(prompt)
            if sequences and prompt[: len(sequences[-1][0])] == sequences[-1][0]:
                earlier_labels = sequences.pop()[1]
                labels[: len(earlier_labels)] = earlier_labels
            sequences.append(([*prompt, *answer], [*labels, *answer]))
    if notes is not None and len(sequences) > 1:
        notes[SPLIT] += 1
    return sequences


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str | Message,
    stop_ids: Collection[int],
    notes: Counter[str] | None = None,
    tools: Tools | None = None,
) -> tuple[list[int], int]:
    """The token ids of a prompt and an answer with the token that ends it, and the index at which the answer begins.

    An answer with tool calls is a message. The prompt has the same token ids as in :func:`prompt_ids`, and both
    together have the same as in :func:`encode`.
    """
    turn = Message(role="assistant", content=answer) if isinstance(answer, str) else answer
    chat = chat_tokenizer(tokenizer)
    prompt_ids, answer_ids = chat.turn(chat.escape([*prompt, turn]), stop_ids, notes, chat.escape(tools))
    return [*prompt_ids, *answer_ids], len(prompt_ids)


def answer_text(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    """The text of a sampled answer. :func:`encode_answer` makes the same token ids of it, if text can express them."""
    return chat_tokenizer(tokenizer).answer_text(answer)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, tools: Tools | None = None
) -> list[int]:
    """The token ids of a whole conversation as its template writes it, for models that were trained elsewhere."""
    chat = chat_tokenizer(tokenizer)
    return chat.ids(chat.template(chat.escape(messages), False, chat.escape(tools)))


def turn_end(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> int | None:
    """The special token with which the chat template ends a turn; None if it writes none.

    A token that only follows the last turn of a conversation counts if there is no other: Phi-3's template ends turns
    with ``<|end|>``, and conversations with ``<|endoftext|>`` too. A token of ``stop_ids`` is preferred.
    """
    chat = chat_tokenizer(tokenizer)
    last, inner = (chat.ids(text) for text in (chat.style.tail, chat.style.inner))
    every = last[: turns.common_prefix(last, inner)]
    special = {token.id for token in chat.special.tokens.values()}
    candidates = [token for token in every if token in special][::-1] or [token for token in last if token in special]
    return next((token for token in [*every, *candidates] if token in stop_ids), candidates[0] if candidates else None)
