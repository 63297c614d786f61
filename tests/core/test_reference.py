"""The reference page has every field, row and member of a run that the code has, with its type and its default."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from alignkit import batches, components, rows
from alignkit.cli.new import KINDS as TEMPLATES
from alignkit.config.settings import plain, typed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text()
COMMON = [field.name for field in dataclasses.fields(components.Component)]
SHOWN = [
    *components.KINDS.values(),
    *(rows.Demonstration, rows.Ranking, rows.Rated, rows.Prompt, rows.Text),
    *(batches.TokenLogps, batches.RankedScores, batches.PreferenceLogps, batches.RatedLogps),
    *(batches.PolicyBatch, batches.HiddenStates),
    *(batches.LossOutput, batches.Answers, batches.Question, batches.Sampling, batches.OffPolicy),
]


def table(title: str) -> list[list[str]]:
    """The rows of the first table under a heading."""
    (section,) = re.findall(rf"^###? {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    lines = re.findall(r"((?:^\|.*\n)+)", section, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def default(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())
    if inspect.isfunction(field.default):
        return f"a function that returns {field.default(None)}"
    return getattr(field.default, "__name__", repr(field.default))


@pytest.mark.parametrize("cls", [components.Component, *SHOWN], ids=lambda cls: cls.__name__)
def test_every_field_stands_there_with_its_type_and_default(cls: type) -> None:
    fields = [f for f in dataclasses.fields(cls) if cls is components.Component or f.name not in COMMON]
    title = "Components" if cls is components.Component else cls.__name__

    assert [row[:3] for row in table(title)] == [
        [f"`{f.name}`", f"`{str(f.type).replace('|', 'or')}`", f"`{default(f)}`"] for f in fields
    ]
    assert all(len(row) == 4 and row[3] for row in table(title))


def members(file: str, name: str) -> dict[str, str]:
    """The public members of a class and their types; for a function, what it returns."""
    tree = ast.parse((ROOT / "alignkit" / file).read_text())
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    fields = {node.target.id: node.annotation for node in cls.body if isinstance(node, ast.AnnAssign)}
    functions = {node.name: node.returns for node in cls.body if isinstance(node, ast.FunctionDef)}
    return {member: ast.unparse(kind) for member, kind in (fields | functions).items() if member[0] != "_"}


@pytest.mark.parametrize("name", ["Run", "Plan"])
def test_every_member_of_a_run_and_a_plan_stands_there_with_its_type(name: str) -> None:
    shown = {}
    for names, kinds, _ in table(name):
        found = re.findall(rf"{name.lower()}\.(\w+)", names)
        kinds = [kind.strip("`").replace(" or ", " | ") for kind in kinds.split("`, `")]
        shown |= dict(zip(found, kinds if len(kinds) > 1 else kinds * len(found), strict=True))

    assert shown == members("protocols.py", name)


def test_every_setting_of_a_run_stands_there() -> None:
    (row,) = [row for row in table("Run") if row[0] == "`run.config`"]

    assert set(re.findall(r"`\.(\w+)", row[2])) == {*members("protocols.py", "RunConfig"), "component", "config"}


def test_a_run_has_no_public_member_that_is_not_in_the_contract() -> None:
    tree = ast.parse((ROOT / "alignkit" / "training" / "run.py").read_text())
    (init,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    set_in_init = re.findall(r"self\.([a-z]\w+)(?:: [^=]+)? = ", ast.unparse(init))

    assert {*members("training/run.py", "Run"), *set_in_init} == set(members("protocols.py", "Run"))


def test_every_key_of_a_message_stands_there() -> None:
    assert [row[0].strip("`") for row in table("Message")] == list(rows.Message.__annotations__)


def test_the_settings_that_the_page_shows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "shown_on_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = typed(
        importlib.import_module("shown_on_the_page").Config, {"table": "a.json", "schedule": {"end": 0.1}}, "loss."
    )

    assert config.table == Path("a.json")
    assert plain(config) == {"table": "a.json", "schedule": {"start": 1.0, "end": 0.1}}


def test_the_first_page_names_every_template() -> None:
    page = (ROOT / "docs" / "first-plugin.md").read_text()

    assert [kind for kind in TEMPLATES if f"`{kind}`" not in page] == []
