"""Writes a chat template in Go's template language, for Ollama.

A Jinja template is a program, so it is not translated but tried out. Most templates write each turn as fixed text
around its content, whatever the other turns are. Rendering conversations with marked contents shows these texts. They
are used only if they render other conversations exactly as the template does.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from alignkit.data.turns import Render, common_prefix
from alignkit.rows import Conversation, Message

MARKS = SYSTEM, USER, ANSWER, LAST = "\uf8fc", "\uf8fd", "\uf8fe", "\uf8ff"  # private use: no template writes them


class Turns(NamedTuple):
    """The fixed texts of a chat template. A pair is what it writes before and after the content of a turn."""

    opening: str  # before the first turn, if that is not a system prompt
    system: tuple[str, str] | None  # None: the template rejects system prompts
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str  # the generation prompt

    def render(self, messages: Conversation) -> str:
        """The text that the template of :meth:`write` renders for the messages."""
        around = self._asdict()
        turns = [f"{around[m['role']][0]}{m['content']}{around[m['role']][1]}" for m in messages]
        return "".join(["" if messages[0]["role"] == "system" else self.opening, *turns, self.prompt])

    def write(self) -> str:
        """The template in Go's language, for Ollama's variables."""
        lines = [f"{{{{- if not .System }}}}{_literal(self.opening)}{{{{ end }}}}"] if self.opening else []
        lines.append("{{- range .Messages }}")
        branch = "if"
        for role in ("system", "user", "assistant"):
            if texts := self._asdict()[role]:
                before, after = map(_literal, texts)
                lines.append(f'{{{{- {branch} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
                branch = "else if"
        return "\n".join([*lines, "{{- end }}", f"{{{{- end }}}}{_literal(self.prompt)}"])

    def without_bos(self, bos: str) -> Turns:
        """For a runtime that adds the beginning-of-sequence token itself."""
        system = self.system and (self.system[0].removeprefix(bos), self.system[1])
        return self._replace(opening=self.opening.removeprefix(bos), system=system)


def _literal(text: str) -> str:
    """A text as an action of its own: Go removes white space beside ``{{-``, but not that of a string."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turns(render: Render) -> Turns | None:
    """The texts of a chat template; None if it does not always write fixed text around the contents of turns."""
    try:
        fixed = _probe(render)
        return fixed if fixed and _agree(fixed, render, "a  b", "c\nd") else None
    except Exception:  # templates raise errors of their own about conversations that they reject
        return None


def keeps_white_space(fixed: Turns, render: Render) -> bool:
    """Whether the template leaves white space around the contents of turns as it is, as Go's does."""
    return _agree(fixed, render, " a\n", "\nb ")


def _agree(fixed: Turns, render: Render, asked: str, answered: str) -> bool:
    system, user, answer = (
        Message(role=role, content=text) for role, text in (("system", asked), ("user", asked), ("assistant", answered))
    )
    conversations: list[Conversation] = [[user], [user, answer, user], [user, answer, user, answer, user]]
    if fixed.system:
        conversations += [[system, *each] for each in conversations]
    return all(fixed.render(each) == render(each, True) for each in conversations)


def _probe(render: Render) -> Turns | None:
    user, answer = Message(role="user", content=USER), Message(role="assistant", content=ANSWER)
    to_prompt = _split(render([user], True))[-1]
    after_user = _common_text(_split(render([user], False))[-1], to_prompt)
    start, to_answer, to_user, _ = _split(render([user, answer, Message(role="user", content=LAST)], False))
    after_answer = _common_text(_split(render([user, answer], False))[-1], to_user)
    before_user = to_user.removeprefix(after_answer)
    if not (start.endswith(before_user) and to_answer.startswith(after_user)):
        return None
    try:
        before_system, after_system, _ = _split(render([Message(role="system", content=SYSTEM), user], False))
        if not after_system.endswith(before_user):  # the system prompt is a part of the first user turn
            return None
        system = (before_system, after_system.removesuffix(before_user))
    except Exception:  # as in `turns`
        system = None
    return Turns(
        opening=start.removesuffix(before_user),
        system=system,
        user=(before_user, after_user),
        assistant=(to_answer.removeprefix(after_user), after_answer),
        prompt=to_prompt.removeprefix(after_user),
    )


def _split(text: str) -> list[str]:
    return re.split(f"[{''.join(MARKS)}]", text)


def _common_text(a: str, b: str) -> str:
    """The common beginning of two texts, without a part of a tag such as ``<|``."""
    return re.sub(r"<[^<>]*\Z", "", a[: common_prefix(a, b)])
