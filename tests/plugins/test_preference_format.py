"""Rows of preferences whose answers are whole conversations, with a prompt beside them."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit import Conversation, DataError, Ranking
from alignkit_formats.convert import fits_hh_rlhf, fits_preference, hh_rlhf, preference

SYSTEM: Conversation = [{"role": "system", "content": "Be kind"}]
OTHER: Conversation = [{"role": "system", "content": "Be short"}]


def talk(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def pair(prompt: Any, before: Conversation) -> dict[str, Any]:
    """A row whose answers follow the same turns."""
    chosen, rejected = ([*before, {"role": "assistant", "content": content}] for content in "xy")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        pytest.param("A", talk("A"), talk("A"), id="the same prompt"),
        pytest.param(" A", [*SYSTEM, *talk("A ")], [*SYSTEM, *talk("A ")], id="a system turn in the conversations"),
        pytest.param("B", talk("A", "b", "B"), talk("A", "b", "B"), id="the last question as prompt"),
        pytest.param([*SYSTEM, *talk("A")], talk("A"), [*SYSTEM, *talk("A")], id="a system turn in the prompt"),
        pytest.param([*SYSTEM, *talk("A")], [*SYSTEM, *talk("A")], [*SYSTEM, *talk("A")], id="a system turn in both"),
        pytest.param("A", talk("A", "b", "B")[1:], talk("A", "b", "B"), id="turns that follow the prompt"),
    ],
)
def test_the_prompt_of_whole_conversations(prompt: Any, before: Conversation, expected: Conversation) -> None:
    """As TRL reads such rows; no turn of the prompt is lost."""
    ranking = preference(pair(prompt, before))

    assert ranking.prompt == expected
    assert (ranking.answers, ranking.ranks) == (["x", "y"], [0.0, 1.0])


@pytest.mark.parametrize(
    ("prompt", "before", "message"),
    [
        ("A", talk("B"), "'prompt' is not part of 'chosen' and 'rejected'"),
        ([*SYSTEM, *talk("A")], [*OTHER, *talk("A")], "'prompt' has another system turn than"),
    ],
)
def test_a_prompt_that_contradicts_the_conversations_is_refused(
    prompt: Any, before: Conversation, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        preference(pair(prompt, before))


def test_transcripts_may_have_their_beginning_in_the_prompt() -> None:
    row = {"prompt": "\n\nHuman: A\n\nAssistant: b\n\nHuman: B\n\nAssistant:", "chosen": " x", "rejected": "y"}

    assert fits_hh_rlhf(row) > fits_preference(row)
    assert hh_rlhf(row) == Ranking(talk("A", "b", "B"), ["x", "y"], [0.0, 1.0])
