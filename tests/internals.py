"""What the tests of libraries' internals share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers


@contextlib.contextmanager
def used_by(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"a library has changed what {place} relies on: {error}") from error


def load(tiny_model: Callable[..., Path], architecture: str = "llama", **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model(architecture), **kwargs).eval()
