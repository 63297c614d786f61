"""The file of labels: begun once, bound to its samples and settings, exported as rankings."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from label_clients import Site, read_rows, write_rows
from label_samples import numbered

from alignkit import ConfigError, DataError, Ranking
from alignkit.cli import main
from alignkit.config import DataConfig
from alignkit.data import load
from alignkit.labeling import binding, export, report
from alignkit.registry import Registry


def rank_all(site: Site, name: str, *best_first: int) -> None:
    """Rank the answers of every item in this order."""
    person = site.labeler(name)
    while item := person.next():
        person.rank(item, [f"item {item['number'] - 1}, answer {answer}" for answer in best_first])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p"}], "samples.jsonl line 1: the row needs a prompt and a list of at least two responses"),
        ([{"prompt": "p", "responses": ["a"]}], "line 1: the row needs a prompt and a list of at least two responses"),
        ([{"prompt": "p", "responses": "a"}], "line 1: the row needs a prompt and a list of at least two responses"),
        ([{"responses": ["a", "b"]}], "line 1: the row needs a prompt and a list of at least two responses"),
        ([*numbered(1), {**numbered(1)[0], "ranks": [0, 1, 2]}], "line 2: the row has 'ranks' already."),
        ([{**numbered(1)[0], "labels": [1]}], "line 1: the row has 'labels' already."),
        ([{"prompt": "p", "responses": ["a", 7]}], "line 1: 'responses' must be text, not int"),
        ([{"prompt": "p", "responses": ["a", " "]}], "line 1: 'responses' is empty"),
        ([{"prompt": "p", "responses": ["a", None]}], "line 1: 'responses' is missing"),
        ([{"prompt": [{"role": "nobody"}], "responses": ["a", "b"]}], "line 1: 'prompt' turn 1 has role 'nobody'"),
        ([{"prompt": "p", "responses": ["a", "\ud800"]}], "line 1: a text holds half of a character"),
        ([], "has no rows to label"),
    ],
)
def test_a_row_that_cannot_be_ranked_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], message: str
) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", rows)

    assert main(["label", str(samples)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["samples.jsonl"]


def test_an_empty_answer_can_be_ranked(sites: Any) -> None:
    """A policy can end its answer at once."""
    assert sites([{"prompt": "p", "responses": ["a", ""]}]).labeler().next()["number"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guide": "Rank badly."}, "--guide: labeling in samples.labels.sqlite started with another guide."),
        ({"scale": 5}, "--scale: labeling in samples.labels.sqlite started with 7."),
        ({"scale": None}, "--no-grades: labeling in samples.labels.sqlite started with 7."),
        ({"flags": []}, "--flags: labeling in samples.labels.sqlite started with 'rude', 'wrong'."),
        ({"overlap": 0.5}, "--overlap: labeling in samples.labels.sqlite started with 0.1."),
        ({"seed": 1}, "--seed: labeling in samples.labels.sqlite started with 0."),
    ],
)
def test_labeling_keeps_the_settings_that_it_was_begun_with(
    sites: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    begun = {"guide": "Rank well.", "flags": ["rude", "wrong"]}
    site = sites(numbered(2), **begun)
    rank_all(site, "anna", 0, 1, 2)
    monkeypatch.chdir(site.samples.parent)

    with pytest.raises(ConfigError, match=message):
        binding.bind(Path("samples.jsonl"), given, print)
    again = sites(**begun)
    assert again.store.settings == site.store.settings == sites().store.settings
    assert len(list(export.lines(site.samples, "mean"))) == 2


def test_appended_rows_are_added(sites: Any) -> None:
    rank_all(sites(numbered(3)), "anna", 0, 1, 2)
    site = sites(numbered(5))

    assert site.messages == [f"{site.samples} has 2 new rows, which are added to {site.store_file}"]
    assert site.labeler("anna").next()["number"] == 4
    assert sites().messages == []


def test_a_bad_row_that_is_appended_changes_nothing(sites: Any) -> None:
    site = sites(numbered(2))
    rank_all(site, "anna", 0, 1, 2)
    with pytest.raises(DataError, match="line 4: the row needs a prompt"):
        sites([*numbered(3), {"prompt": "p"}])

    assert len(list(export.lines(site.samples, "mean"))) == 2
    assert report.report(site.samples)["items"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (numbered(2), "only 2 rows are left"),
        ([numbered(3)[0], {"prompt": "new", "responses": ["a", "b"]}, numbered(3)[2]], "row 2 has changed"),
        ([{**row, "note": 1} for row in numbered(3)], "row 1 has changed"),
        (numbered(3)[::-1], "row 1 has changed"),
    ],
)
def test_labels_are_not_given_to_other_rows(
    sites: Any, rows: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sites(numbered(3))
    rank_all(site, "anna", 0, 1, 2)
    write_rows(site.samples, rows)

    with pytest.raises(DataError, match=message):
        binding.bind(site.samples, {}, print)
    for option in (["--status"], ["--export", str(tmp_path / "r.jsonl")]):
        assert main(["label", str(site.samples), *option]) == 2
        assert re.search(message, capsys.readouterr().err)
    write_rows(site.samples, numbered(4))  # appended rows are no fault
    assert main(["label", str(site.samples), "--status"]) == 0
    write_rows(site.samples, numbered(3))
    assert sites().labeler("anna").next() is None
    site.samples.unlink()
    assert main(["label", str(site.samples), "--status"]) == 0


def test_a_file_that_is_not_a_store_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(2))
    store = tmp_path / "samples.labels.sqlite"
    with sqlite3.connect(store) as other:
        other.execute("CREATE TABLE important (value)")
    other.close()
    before = store.read_bytes()
    for content, message in (
        (before, "was not written by alignkit label"),
        (b"text " * 1000, "file is not a database"),
    ):
        store.write_bytes(content)
        for option in ([], ["--status"], ["--export", str(tmp_path / "r.jsonl")]):
            assert main(["label", str(samples), *option]) == 2
            assert message in capsys.readouterr().err
        assert store.read_bytes() == content


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder in which this process cannot write, even as root."""
    folder = Path(tempfile.mkdtemp())
    write_rows(folder / "samples.jsonl", numbered(2))
    site = Site(write_rows(folder / "labeled.jsonl", numbered(2)))
    rank_all(site, "anna", 2, 1, 0)
    for file in [site.samples, *folder.glob("labeled.labels.sqlite*")]:  # as after kill -9, with a log
        shutil.copy(file, folder / file.name.replace("labeled.", "killed.", 1))
    site.store.close()
    folder.chmod(0o555)
    for file in folder.iterdir():
        file.chmod(0o444)
    user = os.getuid()
    if user == 0:
        os.setresuid(65534, 65534, 0)
    yield folder
    if user == 0:
        os.setresuid(0, 0, 0)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_read_only_folder_cannot_be_labeled_but_read(read_only_folder: Path) -> None:
    assert not (read_only_folder / "labeled.labels.sqlite-wal").exists()
    assert (read_only_folder / "killed.labels.sqlite-wal").exists()
    for name in ("samples", "labeled", "killed"):
        with pytest.raises(ConfigError, match=r"\.labels\.sqlite cannot be used: its folder is read-only"):
            binding.bind(read_only_folder / f"{name}.jsonl", {}, print)
    for name in ("labeled", "killed"):
        samples = read_only_folder / f"{name}.jsonl"
        assert report.report(samples)["done"] == 2
        assert [json.loads(line)["ranks"] for line in export.lines(samples, "mean")] == [[2, 1, 0]] * 2


# --- exports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rankings", "merged"),
    [
        ([[0, 1, 2]], [0, 1, 2]),
        ([[0, 1, 2], [0, 2, 1]], [0, 1, 1]),  # places 0 0, 1 2, 2 1
        ([[0, 1, 2], [2, 1, 0]], [0, 0, 0]),
        ([[0, 0, 1], [1, 0, 2]], [1, 0, 2]),  # the tie takes places 0 and 1, so half each: 1.5, 0.5, 4
        ([[0, 1, 1, 1], [3, 0, 1, 2]], [1, 0, 1, 2]),  # 0 2 2 2 and 3 0 1 2: 3, 2, 3, 4
        ([[0, 1], [0, 1], [1, 0]], [0, 1]),
        ([[0, 0, 0], [0, 0, 0]], [0, 0, 0]),
    ],
)
def test_rankings_are_merged_by_mean_rank(rankings: list[list[int]], merged: list[int]) -> None:
    assert export.mean_ranks(rankings) == merged


def test_an_export_has_the_rows_with_ranks_and_each_labelers_label(sites: Any, tmp_path: Path) -> None:
    rows = [{**row, "source": {"model": "sft", "step": number}} for number, row in enumerate(numbered(3))]
    site = sites(rows, overlap=1.0)
    rank_all(site, "ben", 0, 2, 1)
    rank_all(site, "anna", 0, 1, 2)
    output = tmp_path / "rankings.jsonl"

    assert export.write(site.samples, output, "mean") == (3, 0)
    assert [{k: v for k, v in row.items() if k not in ("ranks", "labels")} for row in read_rows(output)] == rows
    assert [row["ranks"] for row in read_rows(output)] == [[0, 1, 1]] * 3
    assert [[label["labeler"] for label in row["labels"]] for row in read_rows(output)] == [["anna", "ben"]] * 3
    assert [row["labels"][1]["ranks"] for row in read_rows(output)] == [[0, 2, 1]] * 3

    assert export.write(site.samples, output, "apart") == (6, 0)  # an earlier export is replaced
    assert [row["ranks"] for row in read_rows(output)] == [[0, 1, 2], [0, 2, 1]] * 3
    assert [len(row["labels"]) for row in read_rows(output)] == [1] * 6
    read = load(Registry(), DataConfig(), str(output), (Ranking,))
    assert read.format == "ranking"
    assert [located.row.ranks for located in read.rows] == [[0, 1, 2], [0, 2, 1]] * 3


def test_equal_rows_are_not_merged(sites: Any) -> None:
    site = sites(numbered(1, k=2) * 3)
    person = site.labeler()
    for best_first in ([0, 1], [1, 0], [1, 0]):
        person.rank(person.next(), [f"item 0, answer {answer}" for answer in best_first])

    assert [json.loads(line)["ranks"] for line in export.lines(site.samples, "mean")] == [[0, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("content", ["samples", "text", "", "other", "ranked"])
def test_an_export_replaces_no_other_file(
    sites: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    site = sites(numbered(2))
    rank_all(site, "anna", 0, 1, 2)
    output = tmp_path / "out.jsonl"
    ranked = {**numbered(1)[0], "ranks": [0, 1, 2], "labels": []}
    others = {
        "samples": site.samples.read_text(),
        "other": json.dumps({**ranked, "prompt": "another"}) + "\n",
        "ranked": json.dumps({**ranked, "prompt": [ranked]}) + "\n",
    }
    output.write_text(others.get(content, content))

    assert main(["label", str(site.samples), "--export", str(output)]) == 2
    assert f"{output} exists and is not an export of {site.samples}. Choose" in capsys.readouterr().err
    assert output.read_text() == others.get(content, content)


def test_there_is_nothing_to_export_before_the_first_label(
    sites: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_rows(tmp_path / "new.jsonl", numbered(2))
    for option in (["--status"], ["--export", str(tmp_path / "r.jsonl")]):
        assert main(["label", str(samples), *option]) == 2
        assert f"{samples} has no labels yet" in capsys.readouterr().err
        assert not (tmp_path / "new.labels.sqlite").exists()
    assert main(["label", str(sites(numbered(1)).samples), "--export", str(tmp_path / "r.jsonl")]) == 2
    assert "has no labels yet" in capsys.readouterr().err


def test_the_status_has_pace_and_agreement(sites: Any, capsys: pytest.CaptureFixture[str]) -> None:
    site = sites(numbered(4), overlap=1.0)
    for name, rows in (("anna", [(10, "012"), (30, "012"), (9000, "012")]), ("ben", [(20, "012"), (20, "021")])):
        person = site.labeler(name)
        for seconds, best_first in rows:
            item = person.next()
            order = [f"item {item['number'] - 1}, answer {answer}" for answer in best_first]
            person.rank(item, order, seconds=seconds)
    person.post(f"/api/items/{person.next()['id']}/skip")

    assert main(["label", str(site.samples), "--status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert {key: status[key] for key in ("items", "done", "to_do", "skipped", "labels")} == {
        **{"items": 4, "done": 3, "to_do": 1, "skipped": 0, "labels": 5}
    }
    assert status["seconds_per_item"] == 20  # the page that was left open for hours has no influence
    assert status["labelers"] == [
        {"labeler": "anna", "done": 3, "skipped": 0, "seconds_per_item": 30},
        {"labeler": "ben", "done": 2, "skipped": 1, "seconds_per_item": 20},
    ]
    agreement = status["agreement"]
    assert (agreement["items"], agreement["pairs"], agreement["share"]) == (2, 6, 5 / 6)
    assert agreement == person.get("/api/status").json()["agreement"]
    assert agreement["alpha"] == pytest.approx(1 - 23 * 4 / (2 * 12 * 12))  # 24 values; 1 of 6 pairs differs

    assert main(["label", str(site.samples), "--status"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 of 4 rows labeled, 1 to do\nanna: 3 labeled, 0 skipped, 30 seconds per row")
    assert "agreement: 83.3% ± " in printed
    assert "InstructGPT's labelers: 72.6% ± 1.5%" in printed


def test_labelers_who_only_tie_have_no_agreement(sites: Any, capsys: pytest.CaptureFixture[str]) -> None:
    site = sites(numbered(1), overlap=1.0)
    for name in ("anna", "ben"):
        person = site.labeler(name)
        person.put(f"/api/items/{person.next()['id']}", {"ranks": {"0": 0, "1": 0, "2": 0}})

    assert main(["label", str(site.samples), "--status"]) == 0
    assert "agreement: unknown, because no two labelers have ordered the same two answers" in capsys.readouterr().out
