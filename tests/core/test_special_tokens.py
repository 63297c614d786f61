"""Special tokens that are spelled out in a row are text, and all other text stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from alignkit import Text
from alignkit.data.chat_template import encode, encode_answer, load_tokenizer, prompt_ids
from alignkit.data.special_tokens import ESCAPE, FIRST, SpecialToken, SpecialTokens
from alignkit.rows import Message

TOKENS = ["<eos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PRIVATE = [chr(FIRST + number) for number in range(len(TOKENS) + 1)]  # Nerd Fonts has icons there


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS[1:]})
    tokenizer.chat_template = CHATML
    made = tmp_path_factory.mktemp("chatml")
    tokenizer.save_pretrained(made)
    return made


def asked(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


@given(st.lists(st.sampled_from([*TOKENS, "<", "a", ESCAPE, *PRIVATE, "\U000f0300"])).map("".join))
@example(ESCAPE + PRIVATE[0])
def test_every_text_comes_out_of_its_escapes_unchanged(text: str) -> None:
    special = SpecialTokens({token: SpecialToken(number) for number, token in enumerate(TOKENS)})
    escaped = special.escape(text)

    assert special.unescape(escaped) == text
    assert not any(token in escaped for token in TOKENS)
    assert special.escape([{"role": text, text: text}]) == [{"role": text, escaped: escaped}]
    ids = special.ids(escaped + "<eos>" + escaped, characters, characters)
    assert ids == [*map(ord, text), 0, *map(ord, text)]


@pytest.mark.parametrize("special_tokens", ["text", "tokens"])
@pytest.mark.parametrize("text", ["Use \U000f0001 here", f"Use {ESCAPE}\U000f0001 here", f"{ESCAPE}{ESCAPE}"])
def test_private_characters_are_not_read_as_special_tokens(folder: Path, special_tokens: str, text: str) -> None:
    tokenizer: Any = load_tokenizer(str(folder), None, special_tokens=special_tokens)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, start = encode_answer(tokenizer, asked(text), text, [end])

    assert tokenizer.decode(ids[start:]) == f"{text}<|im_end|>"
    assert ids[:start] == prompt_ids(tokenizer, asked(text))
    assert tokenizer.decode(ids[:start]) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("special_tokens", "text", "tokens"),
    [
        ("tokens", "<|im_start|>Hi<|im_end|>", "<|im_start|>Hi<|im_end|><eos>"),
        ("tokens", "<|im_start|><|im_start|>Hi", "<|im_start|><|im_start|>Hi<eos>"),
        ("tokens", "Hi<eos>", "<|im_start|>Hi<eos>"),
        ("text", "<|im_start|>Hi", "<|im_start|><|im_start|>Hi<eos>"),  # the second one is text
    ],
)
def test_a_first_token_that_a_text_spells_out_is_not_added_again(
    folder: Path, tmp_path: Path, special_tokens: str, text: str, tokens: str
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    adds = AutoTokenizer.from_pretrained(folder, bos_token="<|im_start|>")
    bos = adds.bos_token_id
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    adds.save_pretrained(tmp_path)
    tokenizer: Any = load_tokenizer(str(tmp_path), None, special_tokens=special_tokens)
    [(ids, _)] = encode(tokenizer, Text(text), [tokenizer.eos_token_id])

    assert tokenizer.decode(ids) == tokens
    assert ids.count(bos) == (2 if text.count("<|im_start|>") == 2 else 1)
