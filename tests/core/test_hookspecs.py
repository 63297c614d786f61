"""The hook page: every example runs as it is, every hook has a test and stands in the docs."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from pathlib import Path
from typing import Any

import pluggy
import pytest

from alignkit import hookspecs
from alignkit.components import KINDS
from alignkit.registry.registry import DECLARATIONS

HOOKS = [name for name in vars(hookspecs) if name.startswith("alignkit_")]
DOCS = Path(__file__).parents[2] / "docs"


def example(hook: str) -> str:
    """The code block in a hook's docstring."""
    return textwrap.dedent((inspect.getdoc(getattr(hookspecs, hook)) or "").split("::\n", 1)[1])


@pytest.mark.parametrize("hook", HOOKS)
def test_every_example_is_a_plugin_that_implements_its_hook(hook: str) -> None:
    module = types.ModuleType(hook)
    exec(example(hook), module.__dict__)
    manager = pluggy.PluginManager("alignkit")
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.check_pending()

    assert [c.name for c in manager.get_hookcallers(module) or []] == [hook]


@pytest.mark.parametrize(("kind", "hook"), DECLARATIONS.items())
def test_declaration_examples_declare_a_component_of_their_kind(kind: str, hook: str) -> None:
    scope: dict[str, Any] = {}
    exec(example(hook), scope)
    (component,) = scope[hook]()

    assert isinstance(component, KINDS[kind])
    assert component.summary


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_section_in_the_docs_that_is_true(hook: str) -> None:
    sections = (DOCS / "hooks.md").read_text().split("\n## ")
    (section,) = [text for text in sections if text.splitlines()[0] == hook]
    (signature,) = re.findall(rf"^def {hook}\(.*?\) -> .*?(?=:$|:  #)", inspect.getsource(hookspecs), re.M)

    assert [bold in section for bold in ("- **Called** ", "- **By** ", "- **Types** ")] == [True] * 3
    types, shown = re.findall(r"```python\n(.*?)```", section, re.S)[:2]
    assert types.strip() == signature
    assert ast.dump(ast.parse(shown)) == ast.dump(ast.parse(example(hook)))
    assert f"[`{hook}`](#{hook})" in sections[0]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook: str) -> None:
    tests = [p for p in Path(__file__).parents[1].rglob("test_*.py") if p != Path(__file__)]

    assert any(f"def {hook}(" in page.read_text() for page in tests), f"no test implements {hook}"
