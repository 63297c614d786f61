"""The format of rated answers: what each layout becomes, and what a bad row reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import ANY

from alignkit import Conversation, DataError, Demonstration, Rated, data
from alignkit.config import DataConfig
from alignkit.registry import Registry

HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def talk(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def write(folder: Path, row: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return str(file)


GOOD: dict[str, tuple[dict[str, Any], Rated]] = {
    "rated": ({"prompt": "Hi", "completion": "Hello", "label": True}, Rated(talk("Hi"), "Hello", True)),
    "rated as TRL's conversational rows": (
        {"prompt": talk("Hi"), "completion": [*talk("Hi", "Hello")[1:]], "label": False},
        Rated(talk("Hi"), "Hello", False),
    ),
    "rated as messages of several rounds": (
        {"messages": talk("Hi", "Hello", "Bye", "See you"), "label": False},
        Rated(talk("Hi", "Hello", "Bye"), "See you", False),
    ),
    "rated as a CSV file writes it": (
        {"prompt": "Hi", "response": "Hello", "label": " TRUE"},
        Rated(talk("Hi"), "Hello", True),
    ),
    "rated by numbers": ({"prompt": "Hi", "response": "Go", "label": 0}, Rated(talk("Hi"), "Go", False)),
    "rated as LLaMA-Factory's": (
        {"instruction": "Hi", "input": "", "output": "Go", "kto_tag": False},
        Rated(talk("Hi"), "Go", False),
    ),
    "rated as LLaMA-Factory's conversations": (
        {"conversations": [HUMAN, GPT], "kto_tag": True},
        Rated(talk("Hi"), "Hello", True),
    ),
}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Hi", "completion": "Go"}, "'label' is missing"),
    ({"prompt": "Hi", "completion": "Go", "label": "yes"}, "'label' is 'yes': it must be true or false (or 1"),
    ({"prompt": "Hi", "completion": "Go", "kto_tag": 2}, "'kto_tag' is 2: it must be true or false (or 1"),
    ({"prompt": "Hi", "completion": "Go", "label": -1}, "'label' is -1: it must be true or false (or 1 or 0)"),
    ({"prompt": "Hi", "label": True}, "'response' is missing"),
    ({"messages": talk("Hi"), "label": True}, "the last turn must be the assistant's"),
    ({"messages": [*talk("Hi"), CALL], "label": True}, "'messages' has tool_calls, and only answers in text"),
]


@pytest.mark.parametrize(("row", "expected"), GOOD.values(), ids=GOOD.keys())
def test_a_rated_row_is_recognized_and_converted(tmp_path: Path, row: dict[str, Any], expected: Rated) -> None:
    rows = data.load(Registry(), DataConfig(), write(tmp_path, row), ANY)

    assert rows.format == "rated"
    assert [each.row for each in rows.rows] == [expected]


@pytest.mark.parametrize(("row", "expected"), BAD, ids=[text for _, text in BAD])
def test_a_bad_row_is_an_error_that_names_the_field(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(Registry(), DataConfig(format="rated"), write(tmp_path, row), ANY)

    assert str(caught.value).startswith(f"rows.jsonl line 1: {expected}")


def test_a_stage_that_does_not_train_on_rated_answers_reads_the_demonstration(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "Hi", "completion": "Hello", "label": True})
    rows = data.load(Registry(), DataConfig(), file, (Demonstration,))

    assert rows.format == "prompt-completion"
    assert [each.row for each in rows.rows] == [Demonstration(talk("Hi", "Hello"))]
