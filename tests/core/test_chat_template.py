"""What a model learns is told by lengths: the answers and the tokens that end them, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit import AlignkitError, DataError, Demonstration, Text
from alignkit.data.chat_template import IGNORE, encode, load_tokenizer, prompt_ids
from alignkit.rows import Message

CHATML = (
    "{% for m in messages %}{{ '<eos>' + m['role'] + '\\n' + m['content'] + '<eos>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<eos>assistant\\n' }}{% endif %}"
)


def turns(*contents: str) -> list[Message]:
    return [Message(role=("user", "assistant")[i % 2], content=c) for i, c in enumerate(contents)]


def learnt(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(str(tokenizer_folder), None)


@pytest.fixture
def chatml(tokenizer_folder: Path, tmp_path: Path) -> Any:
    (tmp_path / "t.jinja").write_text(CHATML)
    return load_tokenizer(str(tokenizer_folder), str(tmp_path / "t.jinja"))


def test_the_answer_and_its_end_are_learnt_even_where_pad_is_eos(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    [(ids, labels)] = encode(tokenizer, Demonstration(turns("How?", "Like this.")), [tokenizer.eos_token_id])

    assert tokenizer.decode(ids) == "User: How?\nAssistant: Like this.<eos>"
    assert learnt(tokenizer, ids, labels) == " Like this.<eos>"


def test_what_a_template_writes_after_the_end_of_a_turn_is_not_learnt(chatml: Any) -> None:
    [(ids, labels)] = encode(chatml, Demonstration(turns("How?", "So.", "And?", "Thus.")), [chatml.eos_token_id])

    assert chatml.decode(ids).endswith("Thus.<eos>")
    assert learnt(chatml, ids, labels) == "So.<eos>Thus.<eos>"


def test_a_template_without_an_end_gets_one(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    [(ids, labels)] = encode(tokenizer, Demonstration(turns("How?", "Like this.")), [tokenizer.eos_token_id])

    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert learnt(tokenizer, ids, labels).startswith("Like this.")


def test_an_end_of_turn_token_of_the_model_counts_as_an_end(tokenizer: Any) -> None:
    full_stop = tokenizer.convert_tokens_to_ids(".")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    [(ids, _)] = encode(tokenizer, Demonstration(turns("How?", "Like this.")), [tokenizer.eos_token_id, full_stop])

    assert ids[-1] == full_stop


def test_the_prompt_is_what_training_saw(chatml: Any) -> None:
    [(ids, _)] = encode(chatml, Demonstration(turns("How?", "So.")), [chatml.eos_token_id])
    prompt = prompt_ids(chatml, turns("How?"))

    assert ids[: len(prompt)] == prompt


def test_a_text_is_learnt_whole_and_ends(tokenizer: Any) -> None:
    [(ids, labels)] = encode(tokenizer, Text("Once upon a time"), [tokenizer.eos_token_id])

    assert tokenizer.decode(ids) == "Once upon a time<eos>"
    assert labels == [IGNORE, *ids[1:]]


def test_the_plain_template_begins_as_the_tokenizer_does(tokenizer_folder: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    with_bos = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<eos>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    with_bos.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)

    assert tokenizer.decode(prompt_ids(tokenizer, turns("Hi"))) == "<eos>User: Hi\nAssistant:"


def test_a_template_that_refuses_a_conversation_is_a_data_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(DataError, match="the chat template refuses this conversation: .*roles must alternate"):
        prompt_ids(tokenizer, turns("Hi"))


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match=f"no tokenizer could be loaded from {tmp_path}"):
        load_tokenizer(str(tmp_path), None)
