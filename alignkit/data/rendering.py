"""A chat template as a function, without Transformers, so that ``check`` can apply it to rows in milliseconds.

It renders as ``tokenizer.apply_chat_template(..., tokenize=False)`` does, with one difference: a template that asks for
the date gets a fixed one. A run that is resumed on another day therefore keeps its prompts.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignkit.data.tracing import TracedTemplate
from alignkit.errors import AlignkitError, DataError, one_line
from alignkit.rows import Conversation, Tools


class ChatTemplate:
    """A chat template with the named special tokens (``bos_token``, ...) and the date (``2026-11-25``) for it.

    Raises:
        AlignkitError: the template is not valid Jinja.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str], day: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = datetime.datetime.fromisoformat(day).strftime
        self.day, self.named_tokens = day, dict(named_tokens)
        variables = {**self.named_tokens, "tools": None, "documents": None}
        try:
            self._template = environment.from_string(source)
            self._traced = TracedTemplate(environment, source, variables)
        except TemplateError as error:
            raise AlignkitError(f"the chat template is not valid Jinja: {one_line(error)}") from error

    def __call__(self, messages: Conversation, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        """The conversation as text, with the tools that the model may call.

        Raises:
            DataError: the template rejects the conversation.
        """
        traced = self._traced(messages, add_generation_prompt) if tools is None else None
        return self.render(messages, add_generation_prompt, tools) if traced is None else traced

    def render(self, messages: Conversation, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        """As a call, but always with Jinja."""
        try:
            return self._template.render(
                messages=[{key: value for key, value in one.items() if key != "weight"} for one in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.named_tokens,
            )
        except Exception as error:  # errors of jinja2, and those of the template's expressions
            raise DataError(f"the chat template refuses this conversation: {one_line(error)}") from error


class _Generation(Extension):
    """``{% generation %}``, which marks answers in some templates and writes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
