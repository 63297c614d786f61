"""Rows are read from files, folders and saved data sets, and know where they stand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_files import LINES, ROWS, complaint, write, write_parquet

from alignkit import Demonstration, Text
from alignkit.config import DataConfig
from alignkit.data.reading import Rows
from alignkit.data.sources import fingerprints

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
    assert rows.describe() == [f"2 rows from {tmp_path / name} (format text)"]


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
        ("a.jsonl notes.txt a.jsonl.bz2 README.md LICENSE .hidden", "train", "a.jsonl", ["a.jsonl.bz2", "notes.txt"]),
    ],
)
def test_the_files_of_a_folder_are_those_of_the_split(
    read: Callable[..., Rows], tmp_path: Path, names: str, split: str, read_names: str, left_out: list[str] | None
) -> None:
    for name in names.split():
        write(tmp_path / name, LINES)
    rows = read(tmp_path, split=split)
    assert {at.split(" line")[0] for at, _ in rows.rows} == set((read_names or names).split())
    (source,) = rows.sources
    assert left_out is None or source.left_out == left_out
    not_read = f"; not read: {', '.join(source.left_out)}" if source.left_out else "(format text)"
    assert source.describe().endswith(not_read)
    assert fingerprints(DataConfig(path=str(tmp_path), split=split)) == {str(tmp_path): rows.fingerprint}


def test_a_split_that_a_folder_has_not(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", LINES)
    says = f"{tmp_path} has no files of the split 'train'. Splits: test. Choose one with data.split=NAME"
    assert complaint(read, tmp_path) == says
    write(tmp_path / "a.jsonl", LINES)
    assert "no files of the split 'train_sft'. Splits: test, train." in complaint(read, tmp_path, split="train_sft")


def test_what_is_no_file_is_one_line(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert complaint(read, tmp_path / "a.jsonl").endswith("a.jsonl contains no .jsonl .json .csv .parquet file")
    assert complaint(read, tmp_path).endswith(" contains no .jsonl .json .csv .parquet file")
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
