"""Every data format: what a hand-written row becomes, how it is told, and what a bad row is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import ANY

from alignkit import Conversation, DataError, Demonstration, Prompt, Ranking, Row, Text, data
from alignkit.config import DataConfig
from alignkit.registry import Registry

HUMAN, GPT, GO = ({"from": who, "value": said} for who, said in (("human", "Hi"), ("gpt", "Hello"), ("gpt", "Go")))


def talk(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content: str, **more: Any) -> Any:
    return {"role": "assistant", "content": content, **more}


SYSTEM: Conversation = [{"role": "system", "content": "Be kind"}]
PAIR = Ranking(talk("Hi"), ["Hello", "Go"], [0.0, 1.0])
HELLO = Demonstration(talk("Hi", "Hello"))

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = answer("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}])
OPENAI_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
}
TOLD: Any = {"role": "tool", "content": "sunny", "name": "weather"}

GOOD: dict[str, tuple[str, dict[str, Any], Row]] = {
    "messages": ("messages", {"messages": talk("Hi", "Hello")}, HELLO),
    "messages with a system turn and other names of roles": (
        "messages",
        {"messages": [*SYSTEM, {"role": "prompter", "content": "Hi"}, {"role": "model", "content": "Hello"}]},
        Demonstration([*SYSTEM, *talk("Hi", "Hello")]),
    ),
    "messages of several rounds": (
        "messages",
        {"messages": talk("Hi", "Hello", "Bye", "See you")},
        Demonstration(talk("Hi", "Hello", "Bye", "See you")),
    ),
    "messages with a tool": (
        "messages",
        {"messages": [*talk("Hi"), CALL, TOLD, answer("Sunny")], "tools": [WEATHER]},
        Demonstration([*talk("Hi"), CALL, TOLD, answer("Sunny")], [WEATHER]),
    ),
    "messages with a tool as OpenAI writes it: arguments and tools as JSON text, no content": (
        "messages",
        {"messages": [*talk("Hi"), OPENAI_CALL, TOLD, answer("Sunny")], "tools": json.dumps([WEATHER])},
        Demonstration([*talk("Hi"), CALL, TOLD, answer("Sunny")], [WEATHER]),
    ),
    "messages of which some are context only": (
        "messages",
        {"messages": [*talk("Hi"), answer("Hello") | {"weight": 0}, *talk("Bye"), answer("See you") | {"weight": 1}]},
        Demonstration([*talk("Hi"), answer("Hello", weight=0), *talk("Bye"), answer("See you", weight=1)]),
    ),
    "sharegpt of which some are context only": (
        "sharegpt",
        {"conversations": [HUMAN | {"train": False}, GPT | {"train": False}, HUMAN, GO | {"train": True}]},
        Demonstration([*talk("Hi"), answer("Hello", weight=0), *talk("Hi"), answer("Go", weight=1)]),
    ),
    "messages in parts, after a developer's": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be kind"},
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                answer("Hello"),
            ]
        },
        Demonstration([*SYSTEM, *talk("Hi", "Hello")]),
    ),
    "prompt-completion after an earlier answer, which is context": (
        "prompt-completion",
        {"prompt": [*talk("Hi", "Hello", "Bye")], "completion": "See you"},
        Demonstration([*talk("Hi"), answer("Hello", weight=0), *talk("Bye"), answer("See you")]),
    ),
    "prompt-completion": ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}, HELLO),
    "prompt-completion keeps white space": (
        "prompt-completion",
        {"prompt": " Hi\n", "completion": " Hello\n"},
        Demonstration(talk(" Hi\n", " Hello\n")),
    ),
    "prompt-response": ("prompt-completion", {"prompt": "Hi", "response": "Hello"}, HELLO),
    "prompt-completion as messages": (
        "prompt-completion",
        {"prompt": [*SYSTEM, *talk("Hi")], "completion": [answer("Hello")]},
        Demonstration([*SYSTEM, *talk("Hi", "Hello")]),
    ),
    "alpaca": ("alpaca", {"instruction": "Add", "output": "5"}, Demonstration(talk("Add", "5"))),
    "alpaca with tools": (
        *("alpaca", {"instruction": "A", "output": "5", "tools": [WEATHER]}),
        Demonstration(talk("A", "5"), [WEATHER]),
    ),
    "alpaca with input": (
        "alpaca",
        {"instruction": "Add", "input": "2 3", "output": "5", "text": "the whole prompt, which is not read"},
        Demonstration(talk("Add\n\n2 3", "5")),
    ),
    "alpaca with empty input": (
        "alpaca",
        {"instruction": "Add", "input": "", "output": "5"},
        Demonstration(talk("Add", "5")),
    ),
    "alpaca with the NaN that pandas writes for no input": (
        "alpaca",
        {"instruction": "Add", "input": float("nan"), "output": "5"},
        Demonstration(talk("Add", "5")),
    ),
    "alpaca with system": (
        "alpaca",
        {"system": "Be kind", "instruction": "Add", "output": "5"},
        Demonstration([*SYSTEM, *talk("Add", "5")]),
    ),
    "sharegpt": ("sharegpt", {"conversations": [HUMAN, GPT]}, HELLO),
    "sharegpt with system": (
        "sharegpt",
        {"system": "Be kind", "conversations": [HUMAN, GPT]},
        Demonstration([*SYSTEM, *talk("Hi", "Hello")]),
    ),
    "sharegpt preferences": (
        "sharegpt",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GO},
        PAIR,
    ),
    "preference": ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, PAIR),
    "preference as messages": (
        "preference",
        {"prompt": talk("Hi"), "chosen": [answer("Hello")], "rejected": answer("Go")},
        PAIR,
    ),
    "preference with the NaN that pandas writes for no margin": (
        "preference",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "margin": float("nan")},
        PAIR,
    ),
    "preference with tools": (
        "preference",
        {"prompt": [*talk("Hi"), CALL, TOLD], "chosen": "Hello", "rejected": "Go", "tools": [WEATHER]},
        Ranking([*talk("Hi"), CALL, TOLD], ["Hello", "Go"], [0.0, 1.0], tools=[WEATHER]),
    ),
    "preference without prompt": (
        "preference",
        {"chosen": talk("Hi", "Hello", "Bye", "See you"), "rejected": talk("Hi", "Hello", "Bye", "Go")},
        Ranking(talk("Hi", "Hello", "Bye"), ["See you", "Go"], [0.0, 1.0]),
    ),
    "hh-rlhf": (
        "hh-rlhf",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
        PAIR,
    ),
    "hh-rlhf of several rounds and paragraphs": (
        "hh-rlhf",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A\n\nB Human: C\n\nAssistant: See\n\nyou",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A\n\nB Human: C\n\nAssistant: Go",
        },
        Ranking(talk("Hi", "Hello", "A\n\nB Human: C"), ["See\n\nyou", "Go"], [0.0, 1.0]),
    ),
    "ranking with ties": (
        "ranking",
        {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
        Ranking(talk("Hi"), ["a", "b", "c"], [2.0, 1.0, 2.0]),
    ),
    "ranking leaves out null ranks": (
        "ranking",
        {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [0.5, None, 0]},
        Ranking(talk("Hi"), ["a", "c"], [0.5, 0.0]),
    ),
    "ranking of a policy that ended at once": (
        "ranking",
        {"prompt": "Hi", "responses": ["", "b"], "ranks": [1, 0]},
        Ranking(talk("Hi"), ["", "b"], [1.0, 0.0]),
    ),
    "prompts": ("prompts", {"prompt": "Hi"}, Prompt(talk("Hi"))),
    "prompts as messages": ("prompts", {"prompt": [*SYSTEM, *talk("Hi")]}, Prompt([*SYSTEM, *talk("Hi")])),
    "text": ("text", {"text": " Once upon\n"}, Text(" Once upon\n")),
}

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"text": "Hi"}, "'messages' is missing"),
    ("messages", {"messages": talk("Hi", "Go"), "label": False}, "'label' is false, which marks a bad answer: remove"),
    ("prompt-completion", {"prompt": "Hi", "completion": "Go", "label": "False "}, "'label' is false"),
    ("prompt-completion", {"prompt": "Hi", "completion": "Go", "label": 0}, "'label' is false"),
    ("alpaca", {"instruction": "Hi", "output": "Go", "kto_tag": False}, "'kto_tag' is false"),
    ("sharegpt", {"conversations": [HUMAN, GO], "kto_tag": False}, "'kto_tag' is false"),
    ("messages", {"messages": "Hi"}, "'messages' must be a list of {role, content}"),
    ("messages", {"messages": []}, "'messages' must be a list of {role, content}"),
    ("messages", {"messages": talk("Hi")}, "the last turn must be the assistant's"),
    ("messages", {"messages": [{"content": "Hi"}]}, "'messages' turn 1 has role None; known: system, user"),
    ("messages", {"messages": [{"role": "tutor", "content": "Hi"}]}, "'messages' turn 1 has role 'tutor'"),
    ("messages", {"messages": [{"role": [], "content": "Hi"}]}, "'messages' turn 1 has role []"),
    ("messages", {"messages": [*talk("Hi"), {"role": "assistant"}]}, "'messages turn 2 content' is missing"),
    ("messages", {"messages": [*talk("Hi"), answer("x", weight=0)]}, "every assistant turn has weight 0"),
    ("messages", {"messages": [*talk("Hi"), answer("x", weight=0.5)]}, "'messages' turn 2 has weight 0.5; known: 0, 1"),
    ("messages", {"messages": [*talk("Hi"), answer("x", train="no")]}, "turn 2 has train 'no'; known: false, true"),
    (
        "messages",
        {"messages": [talk("Hi")[0] | {"weight": 1}, answer("x")]},
        "assistant's turns are trained on",
    ),
    ("messages", {"messages": [*talk("Hi"), answer("x", function_call={"name": "f"})]}, "write it as tool_calls"),
    ("messages", {"messages": [*talk("Hi"), answer("x", reasoning_content="hm")]}, "turn 2 has 'reasoning_content'"),
    ("messages", {"messages": [*talk("Hi"), answer("x", tool_calls="f()")]}, "tool_calls' must be a list of calls"),
    ("messages", {"messages": [*talk("Hi"), answer("x", tool_calls=[{}])]}, "without the name of a function"),
    (
        "messages",
        {"messages": [*talk("Hi"), answer("x", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]},
        "'messages turn 2 tool_calls arguments' is not valid JSON",
    ),
    (
        "messages",
        {"messages": [*talk("Hi"), answer("x", tool_calls=[{"function": {"name": "f", "arguments": "3"}}])]},
        "'messages turn 2 tool_calls arguments' of f must be an object",
    ),
    ("messages", {"messages": talk("Hi", "x"), "tools": "f"}, "'tools' is not valid JSON"),
    ("messages", {"messages": talk("Hi", "x"), "tools": {"f": 1}}, "'tools' must be a list of JSON schemas"),
    ("messages", {"messages": talk("Hi", "x"), "functions": [{"name": "f"}]}, "write them as 'tools'"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, answer("x")]},
        "'messages turn 1 content' has a part of type 'image_url'; only text is supported",
    ),
    ("prompt-completion", {"completion": "Hello"}, "'prompt' is missing"),
    ("prompt-completion", {"prompt": "Hi"}, "'response' is missing (format 'prompt-completion' needs prompt, and com"),
    ("prompt-completion", {"prompt": "Hi", "completion": " "}, "'completion' is empty"),
    ("prompt-completion", {"prompt": "Hi", "completion": 5}, "'completion' must be text, not int"),
    (
        "prompt-completion",
        {"prompt": talk("Hi", "Hello"), "completion": "x"},
        "'prompt' must not end with an assistant",
    ),
    ("prompt-completion", {"prompt": "Hi", "completion": talk("Hi", "x")}, "'completion' must be one assistant turn"),
    ("alpaca", {"output": "5"}, "'instruction' is missing"),
    ("alpaca", {"instruction": "Add", "output": None}, "'output' is missing"),
    ("alpaca", {"instruction": "Add", "input": ["a", "b"], "output": "5"}, "'input' must be text, not list"),
    ("alpaca", {"instruction": "Add", "input": 5, "output": "5"}, "'input' must be text, not int"),
    ("alpaca", {"instruction": "Add", "output": float("nan")}, "'output' is missing"),
    ("alpaca", {"system": 0, "instruction": "Add", "output": "5"}, "'system' must be text, not int"),
    ("sharegpt", {"chosen": GPT, "rejected": GPT}, "'conversations' is missing"),
    ("sharegpt", {"conversations": talk("Hi", "Hello")}, "'conversations' turn 1 has from None"),
    ("sharegpt", {"conversations": [HUMAN]}, "the last turn must be the assistant's"),
    ("sharegpt", {"conversations": [HUMAN], "chosen": GPT}, "'rejected' is missing"),
    ("sharegpt", {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "'chosen' and 'rejected' are the same"),
    ("sharegpt", {"conversations": [HUMAN], "chosen": HUMAN | {"value": "x"}, "rejected": GPT}, "'chosen' must be"),
    ("sharegpt", {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GO}, "'conversations' must not end with"),
    ("preference", {"prompt": "Hi", "rejected": "Go"}, "'chosen' is missing"),
    ("preference", {"prompt": "Hi", "chosen": "Hello"}, "'rejected' is missing"),
    ("preference", {"chosen": "Hello", "rejected": "Go"}, "'chosen' must be a list of {role, content}"),
    ("preference", {"prompt": "Hi", "chosen": "Go", "rejected": "Go"}, "'chosen' and 'rejected' are the same"),
    ("preference", {"chosen": talk("A", "x"), "rejected": talk("B", "y")}, "must be equal up to their last turn"),
    ("hh-rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello"}, "'rejected' is missing"),
    (
        "preference",
        {"prompt": "Hi", "chosen": [CALL], "rejected": "Go"},
        "'chosen' has tool_calls, and only answers in",
    ),
    ("preference", {"prompt": "Hi", "chosen": [answer("x", weight=0)], "rejected": "Go"}, "'chosen' has weight 0"),
    ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("inf")}, "'margin' holds inf"),
    ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 10**400}, "which is not a number"),
    ("hh-rlhf", {"chosen": "Hi", "rejected": "Ho"}, "'chosen' must begin with 'Human:'"),
    ("hh-rlhf", {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}, "the last turn must be the assistant's"),
    ("hh-rlhf", {"chosen": "Human: A\n\nAssistant:", "rejected": "Human: A"}, "'chosen Assistant' is empty"),
    ("ranking", {"prompt": "Hi", "ranks": [1, 2]}, "'responses' is missing"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"]}, "'ranks' is missing"),
    ("ranking", {"responses": ["a", "b"], "ranks": [1, 2]}, "'prompt' is missing"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1]}, "must be lists of the same length"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, None]}, "needs at least two ranked answers"),
    (
        "ranking",
        {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, "2"]},
        "holds '2', which is not a number",
    ),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, True]}, "'ranks' holds True"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, float("nan")]}, "'ranks' holds nan"),
    ("ranking", {"prompt": "Hi", "responses": ["a", " "], "ranks": [1, 2]}, "'responses' is empty"),
    ("prompts", {"text": "Hi"}, "'prompt' is missing"),
    ("prompts", {"prompt": talk("Hi", "Hello")}, "'prompt' must not end with an assistant turn"),
    ("text", {"prompt": "Hi"}, "'text' is missing"),
    ("text", {"text": "  "}, "'text' is empty"),
]


def write(folder: Path, row: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(("name", "row", "expected"), GOOD.values(), ids=GOOD.keys())
def test_a_row_is_recognized_by_its_fields_and_converted(
    registry: Registry, tmp_path: Path, name: str, row: dict[str, Any], expected: Row
) -> None:
    rows = data.load(registry, DataConfig(), write(tmp_path, row), ANY)
    assert rows.format == name
    assert [r.row for r in rows.rows] == [expected]


@pytest.mark.parametrize(("name", "row", "expected"), GOOD.values(), ids=GOOD.keys())
def test_null_fields_count_as_absent(
    registry: Registry, tmp_path: Path, name: str, row: dict[str, Any], expected: Row
) -> None:
    every_field = {field for _, other, _ in GOOD.values() for field in other}
    rows = data.load(registry, DataConfig(), write(tmp_path, dict.fromkeys(every_field) | row), ANY)
    assert (rows.format, rows.rows[0].row) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), BAD, ids=[f"{name}: {text}" for name, _, text in BAD])
def test_a_bad_row_is_an_error_that_names_the_field(
    registry: Registry, tmp_path: Path, name: str, row: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        data.load(registry, DataConfig(format=name), write(tmp_path, row), ANY)
    message = str(caught.value)
    assert message.startswith("rows.jsonl line 1: ")
    assert expected in message
    assert f"(format '{name}' needs {registry.get('format', name).summary})" in message
    assert "\n" not in message


def test_every_built_in_format_has_a_good_and_a_bad_row(registry: Registry) -> None:
    names = {component.name for component in registry.all("format")} - {"rated"}  # see test_rated_format.py
    assert {name for name, _, _ in GOOD.values()} == names
    assert {name for name, _, _ in BAD} == names


def test_popular_hub_data_sets_are_recognized() -> None:
    registry = Registry()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    worse = [turns[0], {"role": "assistant", "content": "Go away"}]
    formats = {f.name: f for f in registry.all("format")}

    def told(row: dict[str, Any]) -> str:
        return max(formats, key=lambda name: formats[name].fits(row))

    ultrachat = {"prompt": "Hi", "prompt_id": "1", "messages": turns}
    ultrafeedback = {"prompt": "Hi", "chosen": turns, "rejected": worse, "messages": turns, "score_chosen": 1.0}
    assert (told(ultrachat), told(ultrafeedback)) == ("messages", "preference")
    assert formats["preference"].convert(ultrafeedback) == Ranking([turns[0]], ["Hello", "Go away"], [0.0, 1.0])
