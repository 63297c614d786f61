"""On the chat templates of many model families: training begins where sampling begins and ends where sampling ends."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit import DataError, Demonstration
from alignkit.data.chat_template import IGNORE, answer_text, encode, encode_answer, load_tokenizer, prompt_ids, turn_end

TEMPLATES = sorted(Path(str(importlib.util.find_spec("trl").origin)).parent.glob("chat_templates/*.jinja"))  # type: ignore[union-attr]
SPECIAL = re.compile(
    r"<\|[\w/]+\|?>|<\w+\|>|<｜[^｜]+｜>|<(?:start_of_turn|end_of_turn|end_of_utterance|bos|fake_token_around_image)>"
)
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # in the vocabulary, but not special

U1, A1, U2, A2 = "How much is one and one?", "It is 2.", "And\none more?", "That makes 3, I think."
THOUGHT = "<think>\nI add with care.\n</think>\n\n"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS: dict[str, list[Any]] = {
    "one turn": [said("user", U1), said("assistant", A1)],
    "two turns": [said("user", U1), said("assistant", A1), said("user", U2), said("assistant", A2)],
    "thoughts": [
        *(said("user", U1), said("assistant", THOUGHT + A1)),
        *(said("user", U2), said("assistant", THOUGHT + A2)),
    ],
    "one thought": [said("user", U1), said("assistant", A1), said("user", U2), said("assistant", THOUGHT + A2)],
    "system": [said("system", "Be brief."), said("user", U1), said("assistant", A1)],
}


@pytest.fixture(scope="module")
def tokenizer_with(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    from transformers import AutoTokenizer

    @functools.cache
    def make(template: Path) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<bos>")
        special = sorted(set(SPECIAL.findall(template.read_text(encoding="utf-8"))))
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.add_tokens(ADDED)
        folder = tmp_path_factory.mktemp(template.stem)
        tokenizer.save_pretrained(folder)
        return load_tokenizer(str(folder), str(template))

    return make


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_trained_is_what_is_sampled_and_scored(template: Path, tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(template)
    end = turn_end(tokenizer, [tokenizer.eos_token_id])
    stop_ids = [tokenizer.eos_token_id, *([end] if end is not None else [])]
    for name, conversation in CONVERSATIONS.items():
        if name == "system" and "System role not supported" in template.read_text(encoding="utf-8"):
            continue
        rows = encode(tokenizer, Demonstration(conversation), stop_ids)
        learnt = []
        for ids, labels in rows:
            start = 0
            while (start := next((i for i in range(start, len(ids)) if labels[i] != IGNORE), -1)) >= 0:
                stop = next((i for i in range(start, len(ids)) if labels[i] == IGNORE), len(ids))
                learnt.append((ids[:start], ids[start:stop]))
                start = stop
        turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        assert len(learnt) == len(turns), f"{name}: {tokenizer.decode(rows[0][0])}"
        for turn, (before, answer) in zip(turns, learnt, strict=True):
            prompt, content = conversation[:turn], conversation[turn]["content"]
            assert before == prompt_ids(tokenizer, prompt), name
            assert [token in stop_ids for token in answer] == [False] * (len(answer) - 1) + [True], name
            text = tokenizer.decode(before)[-20:] + tokenizer.decode(answer[:-1])
            assert squeezed(content) in squeezed(text), name
            assert squeezed(text).count(squeezed(content)) == 1
            whole, start = encode_answer(tokenizer, prompt, content, stop_ids)
            assert (whole[:start], whole[start:]) == (before, answer)
            sampled = answer_text(tokenizer, answer)
            assert squeezed(sampled).endswith(squeezed(content))
            assert encode_answer(tokenizer, prompt, sampled, stop_ids)[0] == whole, name


TRICKY = [" \nHi ", "", "Well.</think>\n\nGood", "So.\n", "<|im_end|>", "Grüße"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_tracing_and_pieces_change_no_token(
    template: Path, tokenizer_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_with(template)
    rows = [conversation for _ in range(2) for conversation in CONVERSATIONS.values()]
    for n in range(len(TRICKY)):
        texts = [TRICKY[(n + k) % len(TRICKY)] for k in range(4)]
        rows.append([said(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)])

    def encoded(tokenizer: Any) -> list[Any]:
        results: list[Any] = []
        for row in rows:
            try:
                results.append(encode(tokenizer, Demonstration(row), [tokenizer.eos_token_id], notes := Counter()))
                results.append(notes)
            except DataError as error:
                results.append(str(error))
        return results

    fast = encoded(tokenizer)
    monkeypatch.setattr("alignkit.data.tracing.TracedTemplate.__call__", lambda *_: None)
    monkeypatch.setattr("alignkit.data.pieces.of", lambda *_: None)
    slow = copy.copy(tokenizer)  # gets a writer of its own
    assert encoded(slow) == fast


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "which"}}},
        },
    }
]
CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_tools_first_words_and_special_tokens_are_kept_or_refused(template: Path, tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(template)
    end = turn_end(tokenizer, [tokenizer.eos_token_id])
    stop_ids = [tokenizer.eos_token_id, *([end] if end is not None else [])]
    calls: list[Any] = [said("user", U1), {**said("assistant", ""), "tool_calls": [CALL]}]
    calls += [{**said("tool", "sunny"), "name": "weather", "tool_call_id": "call12345"}, said("assistant", A2)]
    try:
        rows = encode(tokenizer, Demonstration(calls, TOOLS), stop_ids)
    except DataError as error:
        assert re.search("leaves out the (tool|call)|refuses this conversation", str(error))  # noqa: PT017
    else:
        learnt = [tokenizer.decode([label for label in labels if label != IGNORE]) for _, labels in rows]
        assert "weather" in tokenizer.decode(rows[0][0])
        assert "Rome" in learnt[0]
        assert squeezed(A2) in squeezed(learnt[-1])

    welcome = [said("assistant", "Welcome."), said("user", U1), said("assistant", A1)]
    try:
        rows = encode(tokenizer, Demonstration(welcome), stop_ids)  # type: ignore[arg-type]
    except DataError as error:
        assert "refuses this conversation" in str(error)  # noqa: PT017
    else:
        texts = "".join(tokenizer.decode([label for label in labels if label != IGNORE]) for _, labels in rows)
        assert texts.count("Welcome.") == texts.count(A1) == 1

    stop = tokenizer.convert_ids_to_tokens(stop_ids[-1])
    ids, start = encode_answer(tokenizer, [said("user", f"Say {stop}!")], f"I say {stop} now.", stop_ids)  # type: ignore[list-item]
    assert [token in stop_ids for token in ids[start:]] == [False] * (len(ids) - start - 1) + [True]
    assert f"I say {stop} now." in tokenizer.decode(ids[start:-1])
