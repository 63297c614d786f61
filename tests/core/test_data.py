"""Reading rows from anywhere, saying where a bad one stands, holding some out."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignkit import ConfigError, Conversation, DataError, Demonstration, PluginError, Prompt, Ranking, Row, Text
from alignkit.cli import main
from alignkit.config import DataConfig, resolve
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.data import Located, Rows, load
from alignkit.data.reading import hold_out
from alignkit.data.sources import fingerprint
from alignkit.registry import Registry

ANY = (Demonstration, Ranking, Prompt, Text)
ROWS = [{"text": "one"}, {"text": "zwölf"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


@pytest.fixture
def read(registry: Registry) -> Callable[..., Rows]:
    def read(path: Path | str, accepts: tuple[type[Row], ...] = ANY, **config: Any) -> Rows:
        return load(registry, DataConfig(**config), str(path), accepts)

    return read


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def write_parquet(file: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


def complaint(read: Callable[..., Rows], path: Path | str, *accepts: type[Row], **config: Any) -> str:
    """The text of the DataError that reading gives, which is one line."""
    with pytest.raises(DataError) as caught:
        read(path, accepts or ANY, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sources -------------------------------------------------------------------------------------------------------

FILES: list[tuple[str, str, list[str]]] = [
    ("a.jsonl", LINES, ["line 1", "line 2"]),
    ("gaps.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n"), ["line 1", "line 3"]),
    ("a.json", json.dumps(ROWS), ["row 1", "row 2"]),
    ("data.json", json.dumps({"version": 1, "data": ROWS}), ["row 1", "row 2"]),
    ("a.csv", "text,n\none,1\nzwölf,2\n", ["line 2", "line 3"]),
    ("bom.csv", '\ufeff"text"\r\n"one"\r\n"zwölf"\r\n', ["line 2", "line 3"]),
]


@pytest.mark.parametrize(("name", "content", "where"), FILES, ids=[name for name, _, _ in FILES])
def test_file_is_read_and_its_rows_know_where_they_stand(
    read: Callable[..., Rows], tmp_path: Path, name: str, content: str, where: list[str]
) -> None:
    rows = read(write(tmp_path / name, content))
    assert rows.rows == [(f"{name} {where[0]}", Text("one")), (f"{name} {where[1]}", Text("zwölf"))]
    assert rows.describe() == f"2 rows from {tmp_path / name} (format text)"


def test_parquet_is_read(read: Callable[..., Rows], tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").rows == [("a.parquet row 1", Text("one")), ("a.parquet row 2", Text("zwölf"))]


def test_folder_gives_the_rows_of_its_files_by_name(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", LINES)
    write(tmp_path / "a.csv", "text\nfirst\n")
    write(tmp_path / "README.md", "not data")
    assert [at for at, _ in read(tmp_path).rows] == ["a.csv line 2", "b.jsonl line 1", "b.jsonl line 2"]


@pytest.mark.parametrize(
    ("names", "split", "read_names", "left_out"),
    [
        ("train.jsonl test.jsonl", "train", "train.jsonl", ["test.jsonl"]),
        ("train.jsonl test.jsonl", "test", "test.jsonl", ["train.jsonl"]),
        ("train.jsonl my-dev.jsonl", "validation", "my-dev.jsonl", ["train.jsonl"]),
        ("a.jsonl eval_b.jsonl", "train", "a.jsonl", ["eval_b.jsonl"]),
        ("train-00000-of-00002.jsonl train-00001-of-00002.jsonl", "train", "", []),
        (
            "train_sft-00000-of-00001.jsonl train_gen-00000-of-00001.jsonl",
            "train_sft",
            "train_sft-00000-of-00001.jsonl",
            None,
        ),
        ("latest.jsonl contest.jsonl", "train", "", []),  # no word of theirs is a split's
        ("a.jsonl notes.txt a.jsonl.gz README.md LICENSE .hidden", "train", "a.jsonl", ["a.jsonl.gz", "notes.txt"]),
    ],
)
def test_the_files_of_a_folder_are_those_of_the_split(
    read: Callable[..., Rows], tmp_path: Path, names: str, split: str, read_names: str, left_out: list[str] | None
) -> None:
    for name in names.split():
        write(tmp_path / name, LINES)
    rows = read(tmp_path, split=split)
    assert {at.split(" line")[0] for at, _ in rows.rows} == set((read_names or names).split())
    assert left_out is None or rows.left_out == left_out
    assert rows.describe().endswith(f"; not read: {', '.join(rows.left_out)}" if rows.left_out else "(format text)")
    assert rows.fingerprint == fingerprint(DataConfig(path=str(tmp_path), split=split))


def test_a_split_that_a_folder_has_not(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", LINES)
    says = f"{tmp_path} has no files of the split 'train'. Splits: test. Pick one with data.split=NAME"
    assert complaint(read, tmp_path) == says
    write(tmp_path / "a.jsonl", LINES)
    assert "no files of the split 'train_sft'. Splits: test, train." in complaint(read, tmp_path, split="train_sft")


def test_what_is_no_file_is_one_line(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert complaint(read, tmp_path / "a.jsonl").endswith(
        "a.jsonl is a folder without any .jsonl .json .csv .parquet file"
    )
    assert complaint(read, tmp_path).endswith(" is a folder without any .jsonl .json .csv .parquet file")
    os.mkfifo(tmp_path / "b.jsonl")
    assert complaint(read, tmp_path / "b.jsonl").endswith("b.jsonl is not a regular file")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "c.jsonl").symlink_to("nowhere")
    for path in (tmp_path / "links", tmp_path / "links" / "c.jsonl"):
        assert complaint(read, path).endswith("c.jsonl is a link to nowhere, which does not exist")
    assert "File name too long" in complaint(read, tmp_path / ("x" * 300 + ".jsonl"))
    assert complaint(read, "~no-such-user/a.jsonl").startswith("no file or folder ~no-such-user/a.jsonl")
    assert complaint(read, " ") == "the path of the data is empty"


@pytest.mark.parametrize("damage", ["not Arrow", ""])
def test_a_damaged_saved_data_set_is_one_line(read: Callable[..., Rows], tmp_path: Path, damage: str) -> None:
    write(tmp_path / "state.json", damage)
    assert "cannot be read as a data set" in complaint(read, tmp_path)


def test_fields_that_arrow_adds_to_an_object_are_not_there(read: Callable[..., Rows], tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {name: 1}}} for name in ("x", "y")]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm", "tool_calls": calls}]
    table = pyarrow.Table.from_pylist([{"messages": turns}])
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").rows[0].row == Demonstration(turns)


def test_a_bad_row_of_parquet_is_skipped_alone(read: Callable[..., Rows], tmp_path: Path) -> None:
    text = pyarrow.array([b"one", b"\xff", b"three"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", on_bad_row="skip")
    assert [row for _, row in rows.rows] == [Text("one"), Text("three")]
    assert [why.split(": ")[0] for why in rows.skipped] == ["a.parquet row 2"]


def test_saved_data_set_is_read(read: Callable[..., Rows], tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved").rows == [("saved row 1", Text("one")), ("saved row 2", Text("zwölf"))]


def test_saved_splits_are_picked_by_name(read: Callable[..., Rows], tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path)
    assert len(read(tmp_path).rows) == 2
    assert len(read(tmp_path, split="test").rows) == 1
    assert "no split 'dev'. Splits: train, test" in complaint(read, tmp_path, split="dev")


def test_bundled_demonstrations_are_demonstrations(read: Callable[..., Rows]) -> None:
    rows = read("bundled:demonstrations", (Demonstration,))
    assert len(rows.rows) > 100
    assert rows.rows[0].where == "demonstrations.jsonl line 1"


def test_fingerprint_follows_the_bytes(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", LINES)
    prints = [read(file).fingerprint, read(tmp_path).fingerprint]
    assert [read(file).fingerprint, read(tmp_path).fingerprint] == prints
    write(file, LINES.replace("one", "two"))
    assert read(file).fingerprint != prints[0]
    assert read(tmp_path).fingerprint != prints[1]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
def test_csv_value_may_hold_unicode_line_marks(read: Callable[..., Rows], tmp_path: Path, mark: str) -> None:
    file = write(tmp_path / "a.csv", f"prompt,completion\nA{mark}B,C\nD,E\n")
    first, second = read(file).rows
    assert first.row.key == f"A{mark}B"
    assert second.where == "a.csv line 3"


# --- what is wrong, and where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", LINES + '{"txt": "x"}\n', "a.jsonl line 3: 'text' is missing (format 'text' needs text)"),
        ("a.json", json.dumps([*ROWS, {"txt": "x"}]), "a.json row 3: 'text' is missing"),
        ("a.csv", "text,n\none,1\n,2\n", "a.csv line 3: 'text' is empty"),
        ("a.jsonl", LINES + '{"text": "cut off', "a.jsonl line 3: not valid JSON: Unterminated string"),
        (
            "a.jsonl",
            LINES + '{"text": ',
            "a.jsonl line 3: not valid JSON: Expecting value at column 10 (is the file cut",
        ),
        ("a.json", '[{"text": "one"},\n{"text": ', "a.json line 2: not valid JSON"),
        ("a.jsonl", LINES.encode("latin-1"), "a.jsonl line 2: not UTF-8 (byte 0xf6); save the file as UTF-8"),
        ("a.json", '[\n{"text": "zwölf"}]'.encode("latin-1"), "a.json line 2: not UTF-8"),
        ("a.csv", "text\none\nzwölf\n".encode("latin-1"), "a.csv line 3: not UTF-8"),
        ("a.jsonl", LINES + "[1]\n", "a.jsonl line 3: a row must be an object with named fields, not a list"),
        ("a.json", '[{"text": "one"}, "two"]', "a.json row 2: a row must be an object with named fields, not a str"),
        ("a.json", '{"text": "one"}', "a.json must hold a list of objects, not one dict"),
        ("a.json", LINES, "a.json line 2: not valid JSON: Extra data; one object a line belongs in a .jsonl file"),
        ("a.csv", "text,n\none,1\ntwo,2,3\n", "a.csv line 3: not as many values as the 2 columns"),
        ("a.csv", "text,n\none,1\ntwo\n", "a.csv line 3: not as many values as the 2 columns"),
        ("a.csv", "text,n,text\none,1,two\n", "a.csv line 1: two columns are named 'text'"),
        ("a.jsonl", "", "a.jsonl has no rows to train on: it is empty"),
        ("a.json", "[]", "a.json has no rows to train on: it is empty"),
        ("a.csv", "text\n", "a.csv has no rows to train on: it is empty"),
        ("a.parquet", "text\none\n", "a.parquet cannot be read as Parquet"),
        ("a.jsonl", LINES + r'{"text": "half \ud83d"}', r"a.jsonl line 3: a text holds half of a character, \ud83d"),
        ("a.json", r'[{"text": "one", "more": [{"a": "\udc00"}]}]', r"a.json row 1: a text holds half of a character"),
        ("a.jsonl", r'{"text": "one", "\ud800": 1}', r"a.jsonl line 1: a text holds half of a character, \ud800"),
        ("a.txt", "one\n", "a.txt: files of data end in .jsonl, .json, .csv, .parquet, not '.txt'"),
        (
            "a.jsonl",
            '{"q": "x", "best": "y"}',
            "a.jsonl: no format fits rows with the fields q, best. Known: a",
        ),
    ],
)
def test_error_says_what_and_where(
    read: Callable[..., Rows], tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    assert says in complaint(read, write(tmp_path / name, content))


def test_damaged_parquet_is_a_data_error(read: Callable[..., Rows], tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", content[:4] + b"\xff" * 30 + content[34:])
    assert complaint(read, tmp_path / "a.parquet").startswith("a.parquet cannot be read as Parquet: ")


def test_missing_file_is_told_with_the_nearest_name(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "demos.jsonl", LINES)
    missing = tmp_path / "demo.jsonl"
    assert complaint(read, missing) == f"no file or folder {missing}. Did you mean 'demos.jsonl'?"


def test_folder_without_data_is_an_error(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\n")
    assert complaint(read, tmp_path) == f"{tmp_path} is a folder without any .jsonl .json .csv .parquet file"


def test_hub_id_that_cannot_be_had_is_one_line(read: Callable[..., Rows]) -> None:
    says = complaint(read, "alignkit-tests/no-such-data")
    assert says.startswith("alignkit-tests/no-such-data is no file or folder here, and the hub gave: ")


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
        (True, "holds votes .*wanted are texts"),
        (2, "plugin votes .* gave .a., expected a row"),
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
    assert rows.describe().endswith("(format tree, max_depth=3, 1 rows of the source give none)")
    flat = load(registry, DataConfig(format={"name": "tree", "max_depth": 1}), str(tree), (Ranking,))
    assert [row for _, row in flat.rows] == [top, top]
    assert load(registry, DataConfig(), str(tree), (Ranking,)).rows == rows.rows  # recognised, with its defaults


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
    with pytest.raises(ConfigError, match="data.format has settings, but the name of no format"):
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


def test_rows_of_a_kind_that_the_stage_does_not_take(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", LINES)
    says = f"{file} holds texts (format 'text'); wanted are demonstrations or rankings"
    assert complaint(read, file, Demonstration, Ranking) == says
    assert complaint(read, file, Demonstration, Ranking, on_bad_row="skip") == says


def test_skip_counts_and_reports_bad_rows(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", f'oops\n{LINES}{{"txt": "x"}}\n{{"text": "three"}}\n[1]\n{{"text": "\\ud800"}}')
    rows = read(file, on_bad_row="skip")
    assert [row for _, row in rows.rows] == [Text("one"), Text("zwölf"), Text("three")]
    assert [why.split(": ")[0] for why in rows.skipped] == [f"a.jsonl line {n}" for n in (1, 4, 6, 7)]
    assert rows.describe() == f"3 rows from {file} (format text, 4 bad rows skipped)"


def test_all_rows_bad_is_an_error_even_with_skip(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": ""}\n')
    says = f"{file} has no rows to train on: all 2 are bad, the first: a.jsonl line 1: 'text' is empty"
    assert complaint(read, file, on_bad_row="skip").startswith(says)


def test_skip_does_not_hide_that_no_format_fits(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"q": "x"}\n{"q": "y"}\n')
    assert complaint(read, file, on_bad_row="skip").startswith(f"{file}: no format fits")


# --- held-out rows -------------------------------------------------------------------------------------------------


def demonstrations(prompts: int, answers: int = 1) -> list[Located]:
    """Rows that ask every prompt ``answers`` times; those of one prompt are far apart."""
    return [Located(f"row {a} {p}", demonstration(p, a)) for a in range(answers) for p in range(prompts)]


def demonstration(prompt: int, answer: int) -> Demonstration:
    return Demonstration([{"role": "user", "content": f"{prompt}"}, {"role": "assistant", "content": f"{answer}"}])


def test_split_is_decided_by_the_seed() -> None:
    rows = demonstrations(50)
    assert hold_out(rows, 10, seed=1) == hold_out(rows, 10, seed=1)
    assert hold_out(rows, 10, seed=1) != hold_out(rows, 10, seed=2)


def test_rows_with_one_prompt_stay_together_and_none_is_lost() -> None:
    rows = demonstrations(20, answers=3)
    train, held = hold_out(rows, 0.25, seed=0)
    assert sorted(train + held, key=rows.index) == rows
    assert {r.row.key for r in train}.isdisjoint(r.row.key for r in held)
    assert len(held) == 15


@pytest.mark.parametrize(
    ("rows", "size", "held"), [(50, 0.2, 10), (50, 7, 7), (50, 1, 1), (50, None, 5), (3000, None, 200), (50, 0, 0)]
)
def test_size_is_a_share_or_a_count(rows: int, size: float | None, held: int) -> None:
    train, out = hold_out(demonstrations(rows), size, seed=0)
    assert (len(train), len(out)) == (rows - held, held)


@pytest.mark.parametrize(("prompts", "answers", "size"), [(5, 1, 5), (1, 9, 0.3), (1, 9, None)])
def test_holding_out_everything_is_an_error(prompts: int, answers: int, size: float | None) -> None:
    rows = demonstrations(prompts, answers)
    with pytest.raises(DataError, match=rf"of {len(rows)} rows leaves none to train on"):
        hold_out(rows, size, seed=0)


def dominated(frequent: int, others: int) -> list[Located]:
    rows = [Located(f"row {a}", demonstration(0, a)) for a in range(frequent)]
    return rows + [Located(f"row {frequent + p}", demonstration(p, 0)) for p in range(1, others + 1)]


@pytest.mark.parametrize("seed", range(10))
def test_a_frequent_prompt_does_not_make_the_held_out_rows_twice_as_many(seed: int) -> None:
    train, held = hold_out(dominated(90, 10), None, seed)
    assert (len(train), len(held)) == (90, 10)  # not the 90 rows of one prompt

    assert len(hold_out(dominated(15, 85), None, seed)[1]) in range(10, 21)


def test_a_split_that_was_near_enough_is_what_it_was() -> None:
    """Runs that were made before are resumed and compared with the rows that they held out."""
    rows = demonstrations(20, answers=3)
    keys = [row.row.key for row in rows[:20]]
    random.Random(0).shuffle(keys)
    assert {row.row.key for row in hold_out(rows, 10, seed=0)[1]} == set(keys[:4])  # 12 rows


def test_no_prompt_that_is_rare_enough_is_an_error_that_says_what_to_set() -> None:
    rows = demonstrations(2, answers=51)
    with pytest.raises(
        DataError, match=r"10 of 102 rows cannot be held out.* fewer than 51\. Set data.eval_size=26 or"
    ):
        hold_out(rows, None, seed=0)
    assert len(hold_out(rows, 26, seed=0)[1]) == 51


def test_rows_made_of_one_raw_row_stay_together() -> None:
    rows = [Located(f"row {p // 4}", demonstration(p, 0)) for p in range(80)]
    train, held = hold_out(rows, 0.25, seed=0)
    assert len(held) == 20
    assert {at for at, _ in train}.isdisjoint(at for at, _ in held)


def test_a_quote_that_is_never_closed_is_an_error_not_a_shorter_file(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'text\none\n"two\nthree\n')

    assert "a.csv line 4: not valid CSV: unexpected end of data" in complaint(read, file)


def test_a_bad_first_row_does_not_decide_the_format(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n' + '{"prompt": "a", "completion": "b"}\n' * 3)

    assert "a.jsonl line 1: 'response' is missing" in complaint(read, file)
