"""What ``docs/security.md`` says about config files and chat templates from other people."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignkit import yaml
from alignkit.data.rendering import ChatTemplate
from alignkit.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!python/object/apply:os.system [touch owned]", "could not determine a constructor"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 100,000 values"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("[" * 10_000, "RecursionError"),
        (f"a: {'1' * 5000}", "ValueError"),
    ],
    ids=["object", "aliases", "itself", "depth", "digits"],
)  # fmt: skip
def test_a_config_file_is_read_without_creating_objects_or_filling_the_memory(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        yaml.loads(text, "run.yaml")


def test_a_config_file_that_never_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").symlink_to("/dev/zero")

    with pytest.raises(ConfigError, match=r"run.yaml is not a config file: it is longer than 10,000,000 characters"):
        yaml.load(tmp_path / "run.yaml")


def test_anchors_still_work() -> None:
    assert yaml.loads("a: &a {x: 1}\nb: {y: *a}", "run.yaml") == {"a": {"x": 1}, "b": {"y": {"x": 1}}}


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages[0]['content'].__class__",
        "messages[0]['content']|attr('__class__')",
        "cycler.__init__.__globals__",
        "raise_exception.__globals__",
        "('{0.__class__}').format(messages)",
        "('{0.__class__}'|attr('format'))(messages)",
        "strftime_now.__self__.__class__",
        "messages.append(1)",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(expression: str) -> None:
    template = ChatTemplate("{% set x = " + expression + " %}{{ x }}{{ x.y }}", {}, "2026-11-26")

    for _ in range(2):  # rendered, and traced
        try:
            assert template([{"role": "user", "content": "hi"}], True) == ""
        except DataError as error:
            assert re.search("unsafe|Security|not safely callable|undefined|has no attribute", str(error))  # noqa: PT017
