"""Lets libraries parse a text once: hundreds of tests train, and each run parses the same templates and metadata.

``conftest.py`` registers it. Equal texts give equal results, so that tests only take less time.
"""

from __future__ import annotations

import email
import functools
import importlib.metadata
from collections.abc import Iterator
from email.message import Message
from typing import Any

import jinja2
import pytest


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Keep compiled templates, of model cards and chats, and the metadata of distributions, for the session."""
    compiled: dict[Any, Any] = {}
    compile_new = jinja2.Environment.compile

    def compile(self: jinja2.Environment, source: Any, *more: Any, **options: Any) -> Any:
        if not isinstance(source, str):
            return compile_new(self, source, *more, **options)
        names = [frozenset(each) for each in (self.extensions, self.filters, self.tests)]
        spaces = self.trim_blocks, self.lstrip_blocks, self.keep_trailing_newline
        key = (type(self), *names, *spaces, source, more, *options.items())
        if key not in compiled:
            compiled[key] = compile_new(self, source, *more, **options)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", compile)
        patch.setattr(importlib.metadata, "email", _Email)
        yield


class _Email:
    """Stands in for the module ``email`` in ``importlib.metadata``, which copies what it gets."""

    @staticmethod
    @functools.cache
    def message_from_string(text: str) -> Message:
        return email.message_from_string(text)
