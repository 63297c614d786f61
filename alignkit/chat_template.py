"""From conversations to token ids: one rendering for every stage.

The chat template joins prompt and response. What the model shall learn is told by *lengths*: the ids that the template
adds when the assistant's turn is added to the conversation. Token identity never decides, so a tokenizer whose pad
token is its end-of-sequence token learns to end all the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import AlignkitError, DataError, one_line
from alignkit.rows import Conversation, Demonstration, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def load_tokenizer(base: str, template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``base``, with a chat template (``template``'s file, its own, or the plain one) and a pad token.

    The pad token is another than the end-of-sequence token wherever the tokenizer has a spare one.

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
            tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise AlignkitError(f"chat_template {template} cannot be read: {error}") from None
    elif tokenizer.chat_template is None:
        begins_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos else "") + PLAIN
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = pad_token(tokenizer)
    return tokenizer


def pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token other than the one that ends an answer, where the tokenizer has one.

    Masks come from lengths here, so any token would do for training; but plain Transformers looks for the last token
    that is no padding to find where a scored text ends.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [token for token in special if token not in (tokenizer.eos_token, tokenizer.bos_token)]
    named = [token for name in ("pad", "unk", "endoftext", "reserved") for token in special if name in token.lower()]
    return (named or [str(tokenizer.eos_token)])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> list[int]:
    """The ids of a conversation up to where the assistant begins to answer."""
    return _render(tokenizer, prompt, add_generation_prompt=True)


def encode(
    tokenizer: PreTrainedTokenizerBase, row: Demonstration | Text, stop_ids: Collection[int]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, both ``[T]``; labels are :data:`IGNORE` where nothing is learnt.

    A demonstration is learnt on its assistant turns, each with the token that ends it; a text is learnt whole, with an
    end-of-sequence token after it. ``stop_ids`` are the tokens at which generation stops.
    """
    if isinstance(row, Text):
        ids = [*tokenizer(row.text)["input_ids"], tokenizer.eos_token_id]
        return ids, [IGNORE, *ids[1:]]  # nothing predicts the first token

    ids = _render(tokenizer, row.messages)
    labels = [IGNORE] * len(ids)
    for turn, message in enumerate(row.messages):
        if message["role"] == "assistant":
            start = _common_prefix(_render(tokenizer, row.messages[:turn], add_generation_prompt=True), ids)
            end = _common_prefix(_render(tokenizer, row.messages[: turn + 1]), ids)
            # templates write a newline after the token that ends a turn; sampling never gets there
            end = next((i + 1 for i in range(end - 1, start - 1, -1) if ids[i] in stop_ids), end)
            labels[start:end] = ids[start:end]
    ids, labels = ids[:end], labels[:end]
    if ids[-1] not in stop_ids:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return ids, labels


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, answer: str, stop_ids: Collection[int]
) -> tuple[list[int], int]:
    """The ids of a prompt and an answer, with the token that ends it, and where the answer begins."""
    turn = Message(role="assistant", content=answer)
    ids, labels = encode(tokenizer, Demonstration([*prompt, turn]), stop_ids)
    start = len(labels)
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return ids, start


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, add_generation_prompt: bool = False
) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates raise jinja2's errors, and whatever their expressions run into
        raise DataError(f"the chat template refuses this conversation: {one_line(error)}") from error
    return list(rendered["input_ids"])


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
