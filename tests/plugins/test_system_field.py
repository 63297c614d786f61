"""The context that rows have in fields of their own: ``system``, and ``history`` of Alpaca rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alignkit import Conversation, DataError, Demonstration, Message
from alignkit.registry import Registry

SYSTEM = Message(role="system", content="You are a pirate.")
ASKED = Message(role="user", content="Hi")
TALK: Conversation = [ASKED, Message(role="assistant", content="Arr")]
OTHER: Conversation = [ASKED, Message(role="assistant", content="Ho")]
HUMAN, GPT, GO = ({"from": who, "value": said} for who, said in (("human", "Hi"), ("gpt", "Arr"), ("gpt", "Ho")))
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant:"

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": TALK}),
    ("messages", {"messages": [SYSTEM, *TALK]}),
    ("prompt-completion", {"prompt": "Hi", "completion": "Arr"}),
    ("prompt-completion", {"prompt": [SYSTEM, ASKED], "completion": "Arr"}),
    ("alpaca", {"instruction": "Hi", "output": "Arr"}),
    ("sharegpt", {"conversations": [HUMAN, GPT]}),
    ("sharegpt", {"conversations": [{"from": "system", "value": "You are a pirate.\n"}, HUMAN, GPT]}),
    ("sharegpt", {"conversations": [HUMAN], "chosen": GPT, "rejected": GO}),
    ("preference", {"prompt": "Hi", "chosen": "Arr", "rejected": "Ho"}),
    ("preference", {"prompt": "Hi", "chosen": TALK, "rejected": OTHER}),
    ("preference", {"chosen": TALK, "rejected": OTHER}),
    ("hh-rlhf", {"chosen": f"{TRANSCRIPT} Arr", "rejected": f"{TRANSCRIPT} Ho"}),
    ("ranking", {"prompt": "Hi", "responses": ["Arr", "Ho"], "ranks": [0, 1]}),
    ("rated", {"prompt": "Hi", "completion": "Arr", "label": True}),
    ("rated", {"messages": TALK, "label": True}),
    ("prompts", {"prompt": "Hi"}),
    ("prompts", {"prompt": [SYSTEM, ASKED]}),
]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}: {', '.join(row)}" for name, row in ROWS])
def test_the_system_field_begins_the_conversation_once(registry: Registry, name: str, row: dict[str, Any]) -> None:
    made: Any = registry.get("format", name).convert({**row, "system": "You are a pirate."})
    conversation = made.messages if isinstance(made, Demonstration) else made.prompt

    assert [turn["role"] for turn in conversation[:3]] in (["system", "user", "assistant"], ["system", "user"])
    assert conversation[0]["content"].strip() == SYSTEM["content"]


def test_another_system_turn_than_the_field_is_a_bad_row(registry: Registry) -> None:
    with pytest.raises(DataError, match="'system' is another text than that of the system turn with which"):
        registry.get("format", "messages").convert({"messages": [SYSTEM, *TALK], "system": "You are polite."})


HISTORY = [["Ahoy?", "Ahoy!"], ["Who?", "Me."]]


@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
def test_the_history_of_an_alpaca_row_is_its_first_turns(registry: Registry, history: Any) -> None:
    made: Any = registry.get("format", "alpaca").convert(
        {"instruction": "Hi", "output": "Arr", "system": SYSTEM["content"], "history": history}
    )

    assert [turn["content"] for turn in made.messages] == [
        SYSTEM["content"],
        "Ahoy?",
        "Ahoy!",
        "Who?",
        "Me.",
        "Hi",
        "Arr",
    ]
    assert [turn["role"] for turn in made.messages] == ["system", *("user", "assistant") * 3]


def test_an_empty_history_is_none_and_another_form_is_a_bad_row(registry: Registry) -> None:
    convert = registry.get("format", "alpaca").convert
    row = {"instruction": "Hi", "output": "Arr"}

    assert convert({**row, "history": []}) == convert({**row, "history": ""}) == convert(row)
    for history in ({"user": "Hi"}, [["Hi"]], ["Hi", "Ho"], "3"):
        with pytest.raises(DataError, match=r"'history' must be a list of \[user, assistant\]"):
            convert({**row, "history": history})
    with pytest.raises(DataError, match="'history assistant' is missing"):
        convert({**row, "history": [["Hi", None]]})
