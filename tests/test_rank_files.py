"""Which files ``alignkit rank`` reads and writes."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_judging import asked, folder, rank, rows_of, write

from alignkit.batches import Answers
from alignkit.cli import main
from alignkit.generation import rankings

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
    for content in ('{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "labels": []}', "[]", "7", '"p"'):
        Path("people.jsonl").write_text(content)
        assert main(["rank", "samples.jsonl", "--by", "right", "-p", "tests", "-o", "people.jsonl"]) == 2
        assert "people.jsonl exists and is not an earlier ranking of samples.jsonl" in capsys.readouterr().err
    assert main(["rank", "sample.jsonl", "--by", "right", "-p", "tests", "-o", "ranked.jsonl"]) == 2
    assert "no file sample.jsonl. Did you mean 'samples.jsonl'?" in capsys.readouterr().err
    assert asked() == []
    rank("right")
    assert "margins" not in json.loads(Path("ranked.jsonl").read_text())  # of other ranks


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_the_samples_are_never_overwritten(folder: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows without a verdict would be lost."""
    file = write(rows_of(["a", "bb"], ["a", "broken"]))
    Path("linked.jsonl").hardlink_to(file)
    before = Path(file).read_bytes()

    for target in (file, "linked.jsonl"):
        arguments = ["--by", "right", "-p", "tests", "-o", "ranked.jsonl", option, target]
        assert main(["rank", file, *arguments]) == 2
        assert f"{option} {target}: the command reads this file. Choose another one" in capsys.readouterr().err
    assert Path(file).read_bytes() == before


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.jsonl.zst", "out.parquet", "out.csv", "out.json"])
def test_rows_are_not_written_under_the_name_of_another_kind_of_file(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(rows_of(["a", "bb"]))

    for command in (
        ["rank", file, "--by", "right", "-p", "tests", "--output", name],
        ["sample", "base", file, "--output", name],
        ["label", file, "--export", name],
    ):
        assert main(command) == 2
        said = f"{command[-2]} {name}: the rows are written as JSON Lines. Choose a name that ends in .jsonl"
        assert said in capsys.readouterr().err
    assert asked() == []


def test_values_of_parquet_that_json_does_not_have_are_written_as_json(folder: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    row = {"prompt": "p", "responses": ["a", "bb"], "when": when, "weight": math.nan}
    parquet.write_table(pyarrow.Table.from_pylist([row]), "samples.parquet")
    command = ["rank", "samples.parquet", "--by", "right", "-p", "tests", "-o", "ranked.jsonl"]

    assert main(command) == 0
    (written,) = Path("ranked.jsonl").read_text().splitlines()
    assert json.loads(written, parse_constant=pytest.fail)["weight"] is None
    assert json.loads(written)["when"] == "2026-01-02T03:04:05"
    assert main(command) == 0  # the same ranking again


def test_scorers_get_the_other_fields_of_the_rows(folder: Path) -> None:
    """Two rows may differ in these alone."""
    rows = [{"prompt": "p", "responses": ["It is 7.", "It is 8."], "answer": right} for right in ("7", "8")]
    write(rows)
    Path("by_field.py").write_text(
        "def score(prompts, answers, fields): return [f['answer'] in a for a, f in zip(answers, fields)]\n"
    )

    assert rank("exact-answer") == rank("by_field:score") == [[0, 1], [1, 0]]
    assert rank("function", "judge.call=by_field:score") == [[0, 1], [1, 0]]
    rank("right")
    assert len(asked()) == 2  # of a judge, verdicts are stored under the prompt and the answers alone


def test_a_function_may_change_what_it_gets() -> None:
    def score(prompts: list[str], answers: list[str], conversations: Any, fields: Any) -> list[float]:
        answers.clear()
        conversations[0].clear()
        return [fields[0].pop("right")[0] for _ in prompts]

    answers = Answers([[{"role": "user", "content": "p"}]], ["a"], [[1]], [[2]], [{"right": [1.0]}])

    assert rankings.scorer(score)(answers) == rankings.scorer(score)(answers) == [1.0]
    assert (len(answers.prompts[0]), answers.texts) == (1, ["a"])


def test_a_function_gets_whole_conversations_if_it_has_a_parameter_for_them(folder: Path) -> None:
    """Its prompts are the last user turns."""
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "and now?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    write([{"prompt": prompt, "responses": ["brief", "long"]}])
    Path("by_turns.py").write_text(
        "def score(prompts, answers, conversations):\n"
        "    assert prompts == ['and now?'] * len(answers)\n"
        "    return [a in c[0]['content'] and len(c) == 4 for a, c in zip(answers, conversations)]\n"
        "def fails(prompts, answers, conversations): return [1 / (a != 'long') for a in answers]\n"
    )

    assert rank("by_turns:score") == rank("function", "judge.call=by_turns:score") == [[0, 1]]
    failing = ["rank", "samples.jsonl", "--by", "by_turns:fails", "-o", "failed.jsonl"]
    assert main(failing) == 2
