"""Which files ``alignkit rank`` reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_judging import asked, folder, rank, rows_of, write

from alignkit.cli import main

__all__ = ["folder"]


def test_files_that_cannot_be_ranked_are_refused_before_anything_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, message in (
        (
            [*rows_of(["a", "b"]), {"prompt": "p"}],
            "samples.jsonl line 2: the row needs a prompt and a list of",
        ),
        ([{"prompt": "p", "responses": ["a", 1]}], "line 1: a response is not a string"),
        ([{"prompt": 5, "responses": ["a", "b"]}], "line 1: 'prompt'"),
        ([{"prompt": [{"role": "user"}], "responses": ["a", "b"]}], "line 1: 'prompt turn 1 content' is missing"),
        (
            [{"prompt": "p", "responses": ["a", "b"], "tools": [{"type": "function", "function": {"name": "f"}}]}],
            "line 1: the prompt has tools",
        ),
        ([], "samples.jsonl has no rows"),
        ([{"prompt": "p", "responses": ["a"], "ranks": [0, 1]}], "line 1: ranks must be a list with a number or null"),
    ):
        write(rows)
        rank("right", status=2)
        assert message in capsys.readouterr().err
    write([{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "margins": [2.0, 0.0]}])
    assert main(["rank", "samples.jsonl", "--by", "right", "-p", "tests", "-o", "samples.jsonl"]) == 2
    assert "the ranks in this file would be overwritten" in capsys.readouterr().err
    Path("people.jsonl").write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "labels": []}))
    assert main(["rank", "samples.jsonl", "--by", "right", "-p", "tests", "-o", "people.jsonl"]) == 2
    assert "people.jsonl exists and is not an earlier ranking of samples.jsonl" in capsys.readouterr().err
    assert main(["rank", "sample.jsonl", "--by", "right", "-p", "tests", "-o", "ranked.jsonl"]) == 2
    assert "no file sample.jsonl. Did you mean 'samples.jsonl'?" in capsys.readouterr().err
    assert asked() == []
    rank("right")
    assert "margins" not in json.loads(Path("ranked.jsonl").read_text())  # of other ranks
