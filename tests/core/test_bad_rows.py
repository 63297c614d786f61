"""A bad row, a damaged file and a missing one: the error says what is wrong, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import LINES, ROWS, complaint, write, write_parquet

from alignkit import Demonstration, Ranking, Text
from alignkit.data.reading import Rows


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
        ("a.txt", "one\n", "a.txt: data files must end in .jsonl, .json, .csv, .parquet, not '.txt'"),
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


def test_a_missing_file_is_an_error_with_the_closest_name(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "demos.jsonl", LINES)
    missing = tmp_path / "demo.jsonl"
    assert complaint(read, missing) == f"no file or folder {missing}. Did you mean 'demos.jsonl'?"


def test_folder_without_data_is_an_error(read: Callable[..., Rows], tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\n")
    assert complaint(read, tmp_path) == f"{tmp_path} contains no .jsonl .json .csv .parquet file"


def test_hub_id_that_cannot_be_had_is_one_line(read: Callable[..., Rows]) -> None:
    says = complaint(read, "alignkit-tests/no-such-data")
    message = "alignkit-tests/no-such-data is not a local file or folder, and loading it from the hub failed: "
    assert says.startswith(message)


def test_rows_of_a_kind_that_the_stage_does_not_take(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", LINES)
    says = f"{file} contains texts (format 'text'); expected demonstrations or rankings"
    assert complaint(read, file, Demonstration, Ranking) == says
    assert complaint(read, file, Demonstration, Ranking, on_bad_row="skip") == says


def test_skip_counts_and_reports_bad_rows(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", f'oops\n{LINES}{{"txt": "x"}}\n{{"text": "three"}}\n[1]\n{{"text": "\\ud800"}}')
    rows = read(file, on_bad_row="skip")
    assert [row for _, row in rows.rows] == [Text("one"), Text("zwölf"), Text("three")]
    assert [why.split(": ")[0] for why in rows.skipped] == [f"a.jsonl line {n}" for n in (1, 4, 6, 7)]
    assert rows.describe() == [f"3 rows from {file} (format text, 4 bad rows skipped)"]


def test_all_rows_bad_is_an_error_even_with_skip(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": ""}\n')
    says = f"{file} has no rows to train on: all 2 are bad. The first: a.jsonl line 1: 'text' is empty"
    assert complaint(read, file, on_bad_row="skip").startswith(says)


def test_skip_does_not_hide_that_no_format_fits(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"q": "x"}\n{"q": "y"}\n')
    assert complaint(read, file, on_bad_row="skip").startswith(f"{file}: no format fits")


def test_a_quote_that_is_never_closed_is_an_error_not_a_shorter_file(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'text\none\n"two\nthree\n')

    assert "a.csv line 4: not valid CSV: unexpected end of data" in complaint(read, file)


def test_a_bad_first_row_does_not_decide_the_format(read: Callable[..., Rows], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n' + '{"prompt": "a", "completion": "b"}\n' * 3)

    assert "a.jsonl line 1: 'response' is missing" in complaint(read, file)
