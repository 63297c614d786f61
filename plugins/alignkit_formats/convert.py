"""Pure functions from a raw row to what it means. Each raises DataError that says what is missing or wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from alignkit import Conversation, DataError, Demonstration, Message, Prompt, Ranking, Text

RawRow = Mapping[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def messages(row: RawRow) -> Demonstration:
    """OpenAI and TRL: ``{"messages": [{"role": "user", "content": ...}, ...]}``; the last turn is the assistant's."""
    return Demonstration(_ending_with_answer(_conversation(_get(row, "messages"), "messages")))


def prompt_completion(row: RawRow) -> Demonstration:
    """``prompt`` and ``completion`` (or ``response``), each a text or messages."""
    field = "completion" if row.get("completion") is not None else "response"
    return Demonstration([*_prompt(row), _message("assistant", _answer(_get(row, field), field), field)])


def alpaca(row: RawRow) -> Demonstration:
    """Stanford Alpaca: ``instruction``, perhaps ``input``, ``output``; LLaMA-Factory's ``system`` too."""
    instruction = _string(row, "instruction")
    context = row.get("input")
    turns = [_message("system", row["system"], "system")] if row.get("system") else []
    turns.append(_message("user", f"{instruction}\n\n{context}" if context else instruction, "instruction"))
    return Demonstration([*turns, _message("assistant", _string(row, "output"), "output")])


def sharegpt(row: RawRow) -> Demonstration | Ranking:
    """ShareGPT turns ``{"from": "human", "value": ...}``; with ``chosen`` and ``rejected``, LLaMA-Factory's pairs."""
    turns = _conversation(_get(row, "conversations"), "conversations", role="from", content="value")
    if row.get("system"):
        turns = [_message("system", row["system"], "system"), *turns]
    if row.get("chosen") is None and row.get("rejected") is None:
        return Demonstration(_ending_with_answer(turns))
    answers = [_one_answer(_conversation([_get(row, s)], s, "from", "value"), s) for s in ("chosen", "rejected")]
    return _pair(_waiting(turns, "conversations"), *answers)


def fits_preference(row: RawRow) -> int:
    """Three fields, or two that hold messages: the prompt is then what both conversations begin with."""
    if row.get("chosen") is None or row.get("rejected") is None or row.get("conversations") is not None:
        return 0
    if row.get("prompt") is not None:
        return 3
    return 2 if isinstance(row["chosen"], list) else 0


def preference(row: RawRow) -> Ranking:
    """``prompt``, ``chosen``, ``rejected``: texts, messages, or whole conversations with or without ``prompt``.

    ``margin``, where it is there, says by how much the chosen one is better.
    """
    chosen, rejected = _get(row, "chosen"), _get(row, "rejected")
    whole = all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected))
    if row.get("prompt") is not None and not whole:
        pair = _pair(_prompt(row), _answer(chosen, "chosen"), _answer(rejected, "rejected"))
    else:
        both = [_ending_with_answer(_conversation(_get(row, side), side)) for side in ("chosen", "rejected")]
        pair = _pair_of_conversations(*both)
    if row.get("margin") is None:
        return pair
    return dataclasses.replace(pair, margins=[_number(row["margin"], "margin"), 0.0])


def fits_hh_rlhf(row: RawRow) -> int:
    """Two transcripts, told by how they begin."""
    sides = [row.get("chosen"), row.get("rejected")]
    transcripts = all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)
    return 2 if transcripts and row.get("prompt") is None else 0


def hh_rlhf(row: RawRow) -> Ranking:
    """Anthropic's hh-rlhf: ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``, the same up to the last answer."""
    return _pair_of_conversations(
        *(_ending_with_answer(_transcript(_string(row, s), s)) for s in ("chosen", "rejected"))
    )


def ranking(row: RawRow) -> Ranking:
    """``prompt``, ``responses`` and ``ranks``; a null rank leaves its answer out (a partial ranking).

    A response may be empty: a policy that ends at once has said so, and is ranked for it.
    ``margins``, where they are there, say how good each response is on a scale, higher being better.
    """
    responses, ranks = _get(row, "responses"), _get(row, "ranks")
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(responses) != len(ranks):
        raise DataError("'responses' and 'ranks' must be lists of one length")
    kept = [index for index, rank in enumerate(ranks) if rank is not None]
    if len(kept) < 2:
        raise DataError("a ranking needs at least two ranked answers")
    margins = row.get("margins")
    if margins is not None and (not isinstance(margins, list) or len(margins) != len(ranks)):
        raise DataError("'margins' must be a list as long as 'responses'")
    return Ranking(
        _prompt(row),
        [responses[index] if responses[index] == "" else _answer(responses[index], "responses") for index in kept],
        [_number(ranks[index], "ranks") for index in kept],
        [_number(margins[index], "margins") for index in kept] if margins is not None else None,
    )


def prompts(row: RawRow) -> Prompt:
    """``prompt``: a text or messages that wait for an answer."""
    return Prompt(_prompt(row))


def text(row: RawRow) -> Text:
    """``text``, to be modelled whole."""
    return Text(_string(row, "text"))


# --- pieces --------------------------------------------------------------------------------------------------------


def _get(row: RawRow, field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"'{field}' is missing")
    return row[field]


def _string(row: RawRow, field: str) -> str:
    return _message("", _get(row, field), field)["content"]


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise DataError(f"'{field}' holds {value!r}, which is no number")
    return float(value)


def _message(role: str, content: Any, field: str) -> Message:
    if not isinstance(content, str):
        raise DataError(f"'{field}' must be text, not {type(content).__name__}")
    if not content.strip():
        raise DataError(f"'{field}' is empty")
    return Message(role=role, content=content)


def _conversation(turns: Any, field: str, role: str = "role", content: str = "content") -> Conversation:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"'{field}' must be a list of {{{role}, {content}}}")
    conversation = []
    for number, turn in enumerate(turns, 1):
        if turn.get(role) not in ROLES:
            raise DataError(f"'{field}' turn {number} has {role} {turn.get(role)!r}; known: {', '.join(ROLES)}")
        conversation.append(_message(ROLES[turn[role]], turn.get(content, ""), f"{field} turn {number} {content}"))
    return conversation


def _ending_with_answer(conversation: Conversation) -> Conversation:
    if conversation[-1]["role"] != "assistant":
        raise DataError("the last turn must be the assistant's")
    return conversation


def _prompt(row: RawRow) -> Conversation:
    prompt = _get(row, "prompt")
    if isinstance(prompt, str):
        return [_message("user", prompt, "prompt")]
    conversation = _conversation(prompt, "prompt")
    return _waiting(conversation, "prompt")


def _waiting(conversation: Conversation, field: str) -> Conversation:
    if conversation[-1]["role"] == "assistant":
        raise DataError(f"'{field}' must not end with an assistant turn")
    return conversation


def _answer(value: Any, field: str) -> str:
    """An answer written as text, as ``{"role": "assistant", "content": ...}``, or as a list with one such message."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return _one_answer(_conversation(value, field), field)
    return _message("assistant", value, field)["content"]


def _one_answer(turns: Conversation, field: str) -> str:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise DataError(f"'{field}' must be one assistant turn")
    return turns[0]["content"]


def _pair(prompt: Conversation, chosen: str, rejected: str) -> Ranking:
    if chosen == rejected:
        raise DataError("'chosen' and 'rejected' are the same")
    return Ranking(prompt, [chosen, rejected], [0.0, 1.0])


def _pair_of_conversations(chosen: Conversation, rejected: Conversation) -> Ranking:
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise DataError("'chosen' and 'rejected' must be alike up to their last turn")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _transcript(transcript: str, field: str) -> Conversation:
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript.strip())
    if parts[0].strip() or len(parts) < 3:
        raise DataError(f"'{field}' must begin with 'Human:'")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        _message(names[name], said.strip(), f"{field} {name}")
        for name, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
