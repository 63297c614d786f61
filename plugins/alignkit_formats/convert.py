"""Pure functions from a raw row to a typed row. Each raises a DataError that names the field that is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, cast

from alignkit import Conversation, DataError, Demonstration, Message, Prompt, Ranking, Rated, Text, fields_of
from alignkit_formats import turns

RawRow = Mapping[str, Any]


def messages(row: RawRow) -> Demonstration:
    """OpenAI and TRL: ``{"messages": [{"role": "user", "content": ...}, ...]}``; the last turn is the assistant's.

    ``tools`` (optional) are the functions that the assistant may call.
    """
    _refuse_unwanted(row)
    conversation = _with_system(row, turns.conversation(_get(row, "messages"), "messages"))
    return Demonstration(_ending_with_answer(conversation), turns.tools(row))


def prompt_completion(row: RawRow) -> Demonstration:
    """``prompt`` and ``completion`` (or ``response``), each a text or messages. Only the completion is trained on."""
    _refuse_unwanted(row)
    field = "completion" if row.get("completion") is not None else "response"
    context = [Message(**{**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in _prompt(row)]
    return Demonstration([*context, _answer_turn(_get(row, field), field)], turns.tools(row))


def alpaca(row: RawRow) -> Demonstration:
    """Stanford Alpaca: ``instruction``, optional ``input``, ``output``; also LLaMA-Factory's ``history``."""
    _refuse_unwanted(row)
    instruction = turns.text(row.get("instruction"), "instruction")
    context = _optional(row, "input")
    user = turns.message("user", f"{instruction}\n\n{context}" if context else instruction, "instruction")
    answer = turns.message("assistant", row.get("output"), "output")
    return Demonstration(_with_system(row, [*turns.history(row), user, answer]), turns.tools(row))


def sharegpt(row: RawRow) -> Demonstration | Ranking:
    """ShareGPT turns ``{"from": "human", "value": ...}``; with ``chosen`` and ``rejected``, LLaMA-Factory's pairs."""
    conversation = turns.conversation(_get(row, "conversations"), "conversations", role="from", content="value")
    conversation = _with_system(row, conversation)
    if row.get("chosen") is None and row.get("rejected") is None:
        _refuse_unwanted(row)
        return Demonstration(_ending_with_answer(conversation), turns.tools(row))
    sides = {side: turns.conversation([_get(row, side)], side, "from", "value") for side in ("chosen", "rejected")}
    chosen, rejected = (_ranked(_one_answer(answer, side), side) for side, answer in sides.items())
    return _pair(_without_answer(conversation, "conversations"), chosen, rejected, row)


def fits_preference(row: RawRow) -> int:
    """``prompt``, ``chosen`` and ``rejected``, or two conversations whose common beginning is the prompt."""
    if row.get("chosen") is None or row.get("rejected") is None or row.get("conversations") is not None:
        return 0
    if row.get("prompt") is not None:
        return 3
    return 2 if isinstance(row["chosen"], list) else 0


def preference(row: RawRow) -> Ranking:
    """``prompt``, ``chosen``, ``rejected``: texts, messages, or whole conversations with or without ``prompt``.

    ``margin`` (optional) is by how much the chosen answer is better.
    """
    chosen, rejected = _get(row, "chosen"), _get(row, "rejected")
    whole = all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected))
    if row.get("prompt") is not None and not whole:
        pair = _pair(_prompt(row), _answer(chosen, "chosen"), _answer(rejected, "rejected"), row)
    else:
        conversations = [turns.conversation(_get(row, side), side) for side in ("chosen", "rejected")]
        if row.get("prompt") is not None:
            conversations = [_with_prompt(_prompt(row), conversation) for conversation in conversations]
        pair = _pair_of_conversations(row, *map(_ending_with_answer, conversations))
    if row.get("margin") is None:
        return pair
    return dataclasses.replace(pair, margins=[_number(row["margin"], "margin"), 0.0])


def fits_hh_rlhf(row: RawRow) -> int:
    """``chosen`` and ``rejected`` transcripts, or a transcript as ``prompt``, recognized by their beginning."""
    sides, prompt = [row.get("chosen"), row.get("rejected")], row.get("prompt")
    if prompt is not None:
        is_open = isinstance(prompt, str) and prompt.rstrip().endswith("Assistant:")
        return 4 if is_open and _is_transcript(prompt) and all(isinstance(side, str) for side in sides) else 0
    return 2 if all(map(_is_transcript, sides)) else 0


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def hh_rlhf(row: RawRow) -> Ranking:
    """Anthropic's hh-rlhf: ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``, equal up to the last answer.

    The common part may be in ``prompt``, which then ends with ``Assistant:``.
    """
    before = f"{_optional(row, 'prompt') or ''} "
    sides = (_transcript(before + turns.text(row.get(side), side), side) for side in ("chosen", "rejected"))
    return _pair_of_conversations(row, *map(_ending_with_answer, sides))


def ranking(row: RawRow) -> Ranking:
    """``prompt``, ``responses`` and ``ranks``; an answer with a null rank is left out (a partial ranking).

    A response may be empty: a policy can end its answer at once. ``margins`` (optional) rate each response on a scale,
    higher being better.
    """
    responses, ranks = _get(row, "responses"), _get(row, "ranks")
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(responses) != len(ranks):
        raise DataError("'responses' and 'ranks' must be lists of the same length")
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
        turns.tools(row),
    )


RATINGS = ("label", "kto_tag")  # TRL's field, and LLaMA-Factory's
RATED = (("prompt", "completion"), ("prompt", "response"), ("messages",), ("conversations",), ("instruction", "output"))
GOOD_OR_BAD = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def fits_rated(row: RawRow) -> int:
    """A demonstration in any format, and whether it is good."""
    return max(fields_of(*answer, rating)(row) for answer in RATED for rating in RATINGS)


def rated(row: RawRow) -> Rated:
    """TRL's and LLaMA-Factory's unpaired preferences: a demonstration with ``label`` or ``kto_tag``, true or false.

    The last turn is the rated answer. 1 and 0 are read as true and false, as are the words, which CSV files contain.
    """
    field = next((name for name in RATINGS if row.get(name) is not None), RATINGS[0])
    good = GOOD_OR_BAD.get(_word(_get(row, field)))
    if good is None:
        raise DataError(f"'{field}' is {row[field]!r}: it must be true or false (or 1 or 0)")
    formats = {"messages": messages, "conversations": sharegpt, "instruction": alpaca, "completion": prompt_completion}
    name = next((name for name in formats if row.get(name) is not None), "completion")
    demonstration = formats[name]({key: value for key, value in row.items() if key not in RATINGS})
    *prompt, answer = cast(Demonstration, demonstration).messages
    return Rated(_context(prompt), _ranked(answer, name), good, demonstration.tools)


def prompts(row: RawRow) -> Prompt:
    """``prompt``: a text, or messages that end before the answer. Other fields, such as ``answer``, are for rewards."""
    fields = {name: value for name, value in row.items() if name not in ("prompt", "tools") and value is not None}
    return Prompt(_prompt(row), turns.tools(row), fields)


def text(row: RawRow) -> Text:
    """``text``, trained on from beginning to end."""
    return Text(turns.text(row.get("text"), "text"))


# --- parts of a row --------------------------------------------------------------------------------------------------


def _get(row: RawRow, field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"'{field}' is missing")
    return row[field]


def _optional(row: RawRow, field: str) -> str | None:
    """A text field; None if it is missing or empty."""
    value = row.get(field)
    return turns.text(value, field) if value not in (None, "") else None


def _with_system(row: RawRow, conversation: Conversation) -> Conversation:
    """The conversation with the system turn that the row has in ``system``, if any."""
    system = _optional(row, "system")
    if system is None:
        return conversation
    if conversation[0]["role"] != "system":
        return [turns.message("system", system, "system"), *conversation]
    if conversation[0]["content"].strip() != system.strip():
        raise DataError("'system' is another text than that of the system turn with which the conversation begins")
    return conversation


def _refuse_unwanted(row: RawRow) -> None:
    """Refuse an unpaired preference (TRL's ``label``, LLaMA-Factory's ``kto_tag``) with a bad answer."""
    for field in RATINGS:
        if GOOD_OR_BAD.get(_word(row.get(field))) is False:
            raise DataError(
                f"'{field}' is false, which marks a bad answer: remove the row (data.on_bad_row=skip does) or the field"
            )


def _word(value: Any) -> str:
    return str(value).strip().lower()


def _number(value: Any, field: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if math.isfinite(number):
            return number
    raise DataError(f"'{field}' holds {value!r}, which is not a number")


def _ending_with_answer(conversation: Conversation) -> Conversation:
    if conversation[-1]["role"] != "assistant":
        raise DataError("the last turn must be the assistant's")
    return conversation


def _prompt(row: RawRow) -> Conversation:
    prompt = _get(row, "prompt")
    if isinstance(prompt, str):
        return _with_system(row, [turns.message("user", prompt, "prompt")])
    return _with_system(row, _without_answer(turns.conversation(prompt, "prompt"), "prompt"))


def _without_answer(conversation: Conversation, field: str) -> Conversation:
    if conversation[-1]["role"] == "assistant":
        raise DataError(f"'{field}' must not end with an assistant turn")
    return _context(conversation)


def _context(conversation: Conversation) -> Conversation:
    """A conversation that is not trained on, so without weights."""
    for turn in conversation:
        turn.pop("weight", None)
    return conversation


def _answer_turn(value: Any, field: str) -> Message:
    """An answer written as text, as ``{"role": "assistant", "content": ...}``, or as a list with one such message."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return _one_answer(turns.conversation(value, field), field)
    return turns.message("assistant", value, field)


def _one_answer(conversation: Conversation, field: str) -> Message:
    if len(conversation) != 1 or conversation[0]["role"] != "assistant":
        raise DataError(f"'{field}' must be one assistant turn")
    return conversation[0]


def _answer(value: Any, field: str) -> str:
    return _ranked(_answer_turn(value, field), field)


def _ranked(turn: Message, field: str) -> str:
    """The text of an answer to compare with others."""
    if "tool_calls" in turn:
        raise DataError(f"'{field}' has tool_calls, and only answers in text can be compared")
    if turn.get("weight") == 0:
        raise DataError(f"'{field}' has weight 0, but answers that are compared are trained on")
    return turn["content"]


def _pair(prompt: Conversation, chosen: str, rejected: str, row: RawRow) -> Ranking:
    if chosen == rejected:
        raise DataError("'chosen' and 'rejected' are the same")
    return Ranking(prompt, [chosen, rejected], [0.0, 1.0], tools=turns.tools(row))


def _with_prompt(prompt: Conversation, conversation: Conversation) -> Conversation:
    """A conversation that begins with an answer, after ``prompt``; one that has the prompt, with its system turn."""
    if conversation[0]["role"] == "assistant":
        return [*prompt, *conversation]
    contents = {turn["content"].strip() for turn in conversation}
    if any(turn["role"] == "user" and turn["content"].strip() not in contents for turn in prompt):
        raise DataError("'prompt' is not part of 'chosen' and 'rejected', which are whole conversations")
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    if conversation[0]["role"] != "system":
        return [*system, *conversation]
    if system and system[0]["content"].strip() not in contents:
        raise DataError("'prompt' has another system turn than 'chosen' and 'rejected'")
    return conversation


def _pair_of_conversations(row: RawRow, chosen: Conversation, rejected: Conversation) -> Ranking:
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise DataError("'chosen' and 'rejected' must be equal up to their last turn")
    prompt = _with_system(row, _context(chosen[:-1]))
    return _pair(prompt, _ranked(chosen[-1], "chosen"), _ranked(rejected[-1], "rejected"), row)


def _transcript(transcript: str, field: str) -> Conversation:
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript.strip())
    if parts[0].strip() or len(parts) < 3:
        raise DataError(f"'{field}' must begin with 'Human:'")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        turns.message(names[name], content.strip(), f"{field} {name}")
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
