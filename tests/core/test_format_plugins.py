"""Formats of plugins: kinds of rows, settings, several rows of one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import ANY, LINES, write

from alignkit import ConfigError, Conversation, DataError, PluginError, Ranking, Text
from alignkit.cli import main
from alignkit.config import DataConfig, resolve
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.data import load
from alignkit.registry import Registry


def test_several_formats_that_fit_are_named_and_one_can_be_picked(install: Callable[..., None], tmp_path: Path) -> None:
    code = """
        from alignkit import DataFormat, Text, fields_of, hookimpl

        @hookimpl
        def alignkit_data():
            convert = lambda row: Text(row["text"].upper())
            return [DataFormat(name="shout", summary="text", fits=fields_of("text"), convert=convert)]
    """
    install("shout", code)
    registry, file = Registry(), write(tmp_path / "a.jsonl", LINES)
    assert load(registry, DataConfig(), str(file), ANY).format == "text"  # installed is not active
    registry.activate("shout")
    with pytest.raises(DataError, match=r"a\.jsonl: several formats fit \(shout, text\)\. .*data\.format=NAME"):
        load(registry, DataConfig(), str(file), ANY)
    assert load(registry, DataConfig(format="shout"), str(file), ANY).rows[0].row == Text("ONE")


def test_a_plugin_brings_a_kind_of_row(tmp_path: Path, install: Callable[..., None]) -> None:
    install(
        "votes",
        """
        from dataclasses import dataclass
        from alignkit import DataFormat, fields_of, hookimpl

        @dataclass(frozen=True)
        class Vote:
            prompt: str
            up: bool

            @property
            def key(self):
                return self.prompt

        @hookimpl
        def alignkit_data():
            make = lambda row: Vote(row["prompt"], row["up"]) if row["up"] != 2 else row["prompt"]
            return [DataFormat(name="votes", summary="prompt, up", fits=fields_of("prompt", "up"), convert=make)]
        """,
    )
    registry = Registry()
    registry.activate("votes")
    from alignkit_votes_plugin import Vote

    rows = load(registry, DataConfig(), str(write(tmp_path / "a.jsonl", '{"prompt": "a", "up": true}\n')), (Vote,)).rows
    assert [row for _, row in rows] == [Vote("a", True)]
    for up, told in (
        (True, "contains votes .*expected texts"),
        (2, "plugin votes .* returned .a., expected a row"),
    ):
        file = write(tmp_path / "b.jsonl", json.dumps({"prompt": "a", "up": up}))
        with pytest.raises((DataError, PluginError), match=told):
            load(registry, DataConfig(), str(file), (Text,))


PAGE = Path(__file__).parents[2] / "docs" / "data-formats.md"

TREE = {"root": "Hi", "replies": [{"text": "Hello", "score": 0.9, "replies": []}, {"text": "Go", "score": 0.1}]}

MORE = [{"text": "And you?", "replies": [{"text": "Well", "score": 1.0}, {"text": "No", "score": 0.0}]}]

DEEP = {**TREE, "replies": [{**TREE["replies"][0], "replies": MORE}, TREE["replies"][1]]}  # type: ignore[dict-item,index]


@pytest.fixture
def tree(install: Callable[..., None], tmp_path: Path) -> Path:
    """The format that the docs show, installed, and a file of its rows."""
    install("tree", re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)[0])
    rows = [TREE, DEEP, {"root": "Alone", "replies": []}]
    return write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_a_format_may_make_several_rows_of_one_and_has_settings(tree: Path) -> None:
    registry = Registry()
    registry.activate("tree")
    hi: Conversation = [{"role": "user", "content": "Hi"}]
    deeper: Conversation = [*hi, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And you?"}]
    top = Ranking(hi, ["Hello", "Go"], [-0.9, -0.1], [0.9, 0.1])
    below = Ranking(deeper, ["Well", "No"], [-1.0, 0.0], [1.0, 0.0])

    rows = load(registry, DataConfig(format={"name": "tree", "max_depth": 3}), str(tree), (Ranking,))
    assert rows.rows == [("a.jsonl line 1", top), ("a.jsonl line 2", top), ("a.jsonl line 2", below)]
    assert rows.describe()[0].endswith("(format tree, max_depth=3, 1 rows of the source give none)")
    flat = load(registry, DataConfig(format={"name": "tree", "max_depth": 1}), str(tree), (Ranking,))
    assert [row for _, row in flat.rows] == [top, top]
    assert load(registry, DataConfig(), str(tree), (Ranking,)).rows == rows.rows  # recognized, with its defaults


def test_settings_of_a_format_come_from_the_file_and_the_command_line(tree: Path) -> None:
    def chosen(file: dict[str, Any], *overrides: str, plugins: tuple[str, ...] = ("rm",)) -> Any:
        cli = merge({"plugins": list(plugins)}, *map(parse_override, overrides))
        made = resolve(registry := Registry(), file, cli)
        assert resolve(registry, made.to_dict(), {"plugins": list(plugins)}).data == made.data
        return made.data.format

    in_file = {"plugins": ["tree"], "data": {"format": {"name": "tree", "max_depth": 5}}}
    assert chosen(in_file) == {"name": "tree", "max_depth": 5}
    assert chosen(in_file, "data.format.max_depth=7") == {"name": "tree", "max_depth": 7}
    assert chosen(in_file, "rm.data.format=preference") == "preference"
    assert chosen(in_file, "data.format=null", "rm.data.format=null") is None
    assert chosen({"data": {"format": "tree"}}, "data.format.max_depth=2", plugins=("rm", "tree")) == {
        "name": "tree",
        "max_depth": 2,
    }
    assert chosen({}, "data.format.max_depth=2", plugins=("rm", "tree")) == {"name": "tree", "max_depth": 2}
    for told, wrong in (
        ("unknown key format.max_dept. Did you mean 'max_depth'", "data.format.max_dept=1"),
        ("format.max_depth: Input should be a valid integer", "data.format.max_depth=deep"),
    ):
        with pytest.raises(ConfigError, match=told):
            chosen(in_file, wrong)
    with pytest.raises(ConfigError, match="data.format has settings but no name"):
        chosen({}, "data.format.max_depth=2")


def test_a_format_with_settings_trains_and_is_listed(
    tree: Path, run_stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**DEEP, "root": f"Hi {n}"} for n in range(8)]
    tree.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--plugin", "tree", "--data", str(tree), "data.format.max_depth=1"]
    run = run_stage("rm", "rm.policy=base", *arguments)
    assert "8 rows from" in capsys.readouterr().out

    record = json.loads((run / "alignkit.json").read_text())
    assert record["config"]["stages"]["rm"]["data"]["format"] == {"name": "tree", "max_depth": 1}
    assert run_stage("rm", "rm.policy=base", *arguments) == run
    assert "nothing to train" in capsys.readouterr().out
    assert main(["config", "--plugin", "rm", "--plugin", "tree", "data.format.max_depth=4"]) == 0
    assert "format: {max_depth: 4, name: tree}" in capsys.readouterr().out
    assert main(["plugins", "tree"]) == 0
    assert "max_depth: 3  # turns of the user that are followed down the tree" in capsys.readouterr().out
