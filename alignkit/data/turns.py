"""Finding where a prompt ends and an answer begins in the text that a chat template renders.

This module works on text and needs no tokenizer: ``render(messages, add_generation_prompt)`` is a chat template.
Training must begin where sampling begins. So the prompt of a turn is always the conversation before it with the
generation prompt, and its answer is what follows. Four kinds of templates need special treatment:

- Some open a thought in the generation prompt (``<think>``), and leave it out when they render the answer
  (DeepSeek-R1). The answer is then the message's own text, without a second ``<think>``. An answer without a thought
  gets an empty one.
- Some leave out part of an answer. The answer is then the message's own text.
- Some rewrite earlier turns once the answer is there (gpt-oss). The answer is then the message's own text too, behind
  what the template writes before it.
- Some accept content only as a list of parts (vision models). They get such a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from alignkit.errors import DataError
from alignkit.rows import Conversation, Message

Render = Callable[[Conversation, bool], str]

MARK = "\uf8ff"  # stands for the answer in a probe; a private-use character, which no template writes
THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*\Z")  # opened by a generation prompt
THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>")

EMPTY_THOUGHT = "answers get an empty thought, since the chat template opens a thought in its generation prompt"
CLOSED_THOUGHT = "answers hold a thought after the empty one with which the chat template's generation prompt ends"
REWRITTEN = (
    "answers follow their prompts as sampling does, since the chat template writes these differently before answers"
)
WRITTEN_OUT = "answers are written out in full, since the chat template leaves out part of them (often the thought)"


@dataclass(frozen=True)
class Style:
    """The text that a chat template writes around an answer; :func:`probe` finds it by rendering one."""

    opening: str = ""  # the thought that the generation prompt opens: "<think>\n"
    lead: str = ""  # between the generation prompt and an answer without a thought
    tail: str = ""  # after the last answer
    inner: str = ""  # after an earlier answer
    parts: bool = False  # content must be a list of parts

    @property
    def closing(self) -> str:
        """``"</think>"``."""
        return self.opening.strip().replace("<", "</")


def probe(render: Render) -> Style:
    """The style of a chat template; an empty one if the template rejects every probe."""
    for parts in (False, True):
        for first in ([], [Message(role="system", content="s")]):
            try:
                style = _probe(render, _with_parts([*first, Message(role="user", content="u")], parts), parts)
            except DataError:
                continue
            if style is not None:
                return style
    return Style()


def _probe(render: Render, asked: Conversation, parts: bool) -> Style | None:
    answered = [*asked, *_with_parts([Message(role="assistant", content=MARK)], parts)]
    prompt, whole = render(asked, True), render(answered, False)
    if MARK not in whole:
        return None
    try:
        inner = render([*answered, asked[-1]], False).partition(MARK)[2]
    except DataError:  # the template is for a single turn
        inner = ""
    opened = THOUGHT.search(prompt)
    lead, _, tail = whole[common_prefix(prompt, whole) :].partition(MARK)
    if generation_prompt := prompt.removeprefix(render(asked, False)):
        lead = lead.rpartition(generation_prompt)[2]  # there if the template rewrites the turns before
    style = Style(opened[0] if opened else "", lead, tail, inner, parts)
    if opened and style.closing not in lead:
        style = replace(style, lead=f"\n{style.closing}\n\n{lead}")
    return style


def prompt(render: Render, style: Style, messages: Conversation) -> str:
    """The rendered conversation with the generation prompt."""
    if messages:
        return render(_with_parts(messages, style.parts), True)
    # the assistant begins: the prompt is what the template writes before an answer
    first = render(_with_parts([Message(role="assistant", content=MARK)], style.parts), False)
    before, mark, _ = first.partition(MARK)
    if not mark:
        raise DataError("the chat template leaves out the answer that begins this conversation")
    return before.removesuffix(style.lead) + style.opening


def answer(render: Render, style: Style, messages: Conversation, before: str, notes: Counter[str]) -> str:
    """The answer of the last turn of ``messages``, with what ends it; ``before`` is its prompt.

    ``notes`` counts the answers that the template does not write as they are.

    Raises:
        DataError: the template rejects the conversation, or writes a tool call without its text or not at all.
    """
    whole = render(_with_parts(messages, style.parts), False)
    written = _written(whole, before, style)
    content = str(messages[-1]["content"] or "")
    opened = bool(style.opening) and before.endswith(style.opening)
    kept = _squeezed(content) in _squeezed(written)
    if opened and (content.lstrip().startswith(style.opening.strip()) or style.closing in content):
        text = _ended(content.lstrip().removeprefix(style.opening.strip()).removeprefix("\n"), written, style)
    elif whole.startswith(before) and kept:
        text = written
    elif opened and kept:
        text = written if style.closing in written else style.lead + written
        notes[EMPTY_THOUGHT] += 1
    else:
        has_lead = not opened and _squeezed(style.lead + content) in _squeezed(written)
        text = (style.lead if has_lead else "") + _ended(content, written, style)
        closed = not whole.startswith(before) and not THOUGHT_END.split(before)[-1].strip()
        notes[CLOSED_THOUGHT if closed and THOUGHT_END.search(content) else REWRITTEN if kept else WRITTEN_OUT] += 1
    for call in messages[-1].get("tool_calls") or []:
        if (name := call["function"]["name"]) not in text:
            fault = "rewrites what is before" if kept else "leaves out the text before"
            raise DataError(
                f"the chat template {fault if name in written else 'leaves out'} the call of the tool '{name}'"
            )
    return text


def _written(whole: str, before: str, style: Style) -> str:
    """The text that the template writes for the last turn, without the thought that ``before`` already opens."""
    if whole.startswith(before):
        return whole[len(before) :]
    unopened = before.removesuffix(style.opening)
    if whole.startswith(unopened):
        return whole[len(unopened) :].removeprefix(style.opening.strip())
    return whole[common_prefix(before, whole) :]


def _ended(answer: str, written: str, style: Style) -> str:
    """An answer with the text that the template writes after it, found behind the words after its thought."""
    last = THOUGHT_END.split(answer)[-1].strip()
    body = written.removesuffix(style.tail)  # whose text may have the answer in it: "e" is in "<eos>"
    _, match, after = body.rpartition(last) if last else ("", "", "")
    return answer.rstrip() + after + written[len(body) :] if match else answer + style.tail


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _squeezed(text: str) -> str:
    """The text without white space, which templates strip and add."""
    return "".join(text.split())


def _with_parts(messages: Conversation, parts: bool) -> Conversation:
    if not parts:
        return messages
    listed = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    return cast(Conversation, listed)
