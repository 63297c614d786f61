"""``data.path`` with several sources: weights, held-out rows, locations, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit import ConfigError, DataError, Prompt, Ranking
from alignkit.config import DataConfig
from alignkit.config.data_sources import normalized
from alignkit.data import spool
from alignkit.data.held_out import Split, split
from alignkit.data.reading import Rows, load
from alignkit.data.sources import check_splits
from alignkit.registry import Registry

WEIGHTS: list[Any] = [0, -1, float("nan"), float("inf"), "heavy", None]


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def prompts(name: str, texts: list[str]) -> str:
    return write(name, [{"prompt": text} for text in texts])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: Any, **config: Any) -> Rows:
    return load(Registry(), DataConfig(path=path, **config), path, (Prompt, Ranking))


def divided(path: Any, size: float | None = 0, seed: int = 0) -> Split:
    return split(read(path), size, seed)


def texts(rows: Any) -> list[str]:
    return [row.prompt[0]["content"] for _, row in rows]


A, B = [f"a{n}" for n in range(20)], [f"b{n}" for n in range(30)]


@pytest.mark.parametrize("in_memory", [20_000, 10], ids=["list", "spool"])
def test_a_weight_is_how_often_an_epoch_has_a_row(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    path = [{"path": prompts("a.jsonl", A), "weight": 2}, {"path": prompts("b.jsonl", B), "weight": 1.5}]

    counts = Counter(texts(divided(path).train))
    assert [counts[text] for text in A] == [2] * 20
    assert sorted(counts[text] for text in B) == [1] * 15 + [2] * 15


def test_a_fraction_is_the_same_rows_at_every_start_and_other_rows_with_another_seed() -> None:
    path = [{"path": prompts("a.jsonl", A), "weight": 0.5}, prompts("b.jsonl", B)]

    chosen = [text for text in texts(divided(path).train) if text in A]
    assert len(chosen) == len(set(chosen)) == 10
    assert texts(divided(path).train) == texts(divided(path).train)
    assert {text for text in texts(divided(path, seed=1).train) if text in A} != set(chosen)


def test_rows_of_several_sources_are_shuffled() -> None:
    """A trainer that takes rows in their order, and the first rows that `check` checks, see every source."""
    train = texts(divided([prompts("a.jsonl", A), prompts("b.jsonl", B)]).train)
    assert sorted(train) == sorted(A + B)
    assert {text[0] for text in train[:10]} == {"a", "b"}


def test_every_source_has_held_out_rows_which_are_not_repeated() -> None:
    path = [{"path": prompts("a.jsonl", A), "weight": 3}, {"path": prompts("b.jsonl", B), "weight": 0.5}]

    train, held_out = divided(path, size=0.2)
    counts = Counter(text[0] for text in texts(held_out))
    assert counts == {"a": 4, "b": 6}
    assert max(Counter(texts(held_out)).values()) == 1
    assert not set(texts(held_out)) & set(texts(train))
    assert len(train) == 3 * 16 + 24 // 2


def test_another_source_changes_no_earlier_split() -> None:
    a, b = prompts("a.jsonl", A), prompts("b.jsonl", [*A[::2], *B])

    alone = set(texts(divided(a, size=5).held_out))
    both = divided([a, b], size=5)
    assert {text for text in texts(both.held_out) if text in A} == alone
    assert {text for text in texts(both.train) if text in A} == set(A) - alone
    own = {text for text in texts(divided(b, size=5).held_out) if text in B}
    assert {text for text in texts(both.held_out) if text in B} == own


def test_a_prompt_in_several_sources_is_on_one_side() -> None:
    """Round 2 asks the prompts of round 1 again: what round 1 held out stays held out."""
    rounds = [prompts(f"round-{n}/rankings.jsonl", A[n:]) for n in range(3)]

    train, held_out = divided(rounds, size=0.25)
    assert len(set(texts(held_out))) >= 5
    assert not set(texts(held_out)) & set(texts(train))
    assert len(train) + len(held_out) == 20 + 19 + 18


def test_rows_of_one_raw_row_stay_with_the_prompt_that_an_earlier_source_has() -> None:
    from alignkit.data.held_out import _as_earlier
    from alignkit.data.row_cache import key_hash as digest
    from alignkit.rows import Located

    known, new = (Prompt([{"role": "user", "content": text}]) for text in ("known", "new"))
    sides = {digest(known): True}
    assert _as_earlier([Located("t 1", known), Located("t 1", new)], set(), sides) == {0, 1}
    assert sides[digest(new)]


def test_locations_name_the_folder_and_formats_are_those_of_each_source() -> None:
    ranking = {"prompt": "p", "responses": ["x", "y"], "ranks": [0, 1]}
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    one, two = write("round-1/data.jsonl", [ranking]), write("round-2/data.jsonl", [pair])
    write("folder/train.jsonl", [ranking])

    rows = read([one, two, "folder"])
    assert [where for where, _ in rows.rows] == [f"{one} line 1", f"{two} line 1", "folder/train.jsonl line 1"]
    assert [source.format for source in rows.sources] == ["ranking", "preference", "ranking"]
    assert read(two).rows[0].where == "data.jsonl line 1"

    Path(two).write_text('{"prompt": "q", "chosen": "x", "rejected": "y"}\noops\n')
    with pytest.raises(DataError, match=r"^round-2/data\.jsonl line 2: not valid JSON"):
        read([one, two])
    assert read([one, two], on_bad_row="skip").skipped[0].startswith("round-2/data.jsonl line 2: not valid")


def test_a_source_has_a_split_of_its_own() -> None:
    prompts("folder/train.jsonl", A)
    prompts("folder/test.jsonl", B)

    rows = read([{"path": "folder", "split": "test"}, {"path": "folder"}])
    assert [source.rows for source in rows.sources] == [30, 20]


def test_a_source_without_an_own_setting_is_written_as_a_path() -> None:
    """So that a run is recognized, however its data were named."""
    assert normalized(["a.jsonl"]) == normalized([{"path": "a.jsonl", "weight": 1}]) == "a.jsonl"
    assert normalized({"path": "a.jsonl", "weight": 2}) == [{"path": "a.jsonl", "weight": 2.0}]
    assert normalized(["a.jsonl", {"path": "b.jsonl"}]) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], r"^data\.path is an empty list"),
        (["a.jsonl", "b.jsonl", "./a.jsonl"], r"^data\.path names \./a\.jsonl twice\. .*set its weight"),
        (["a.jsonl", {"path": "b.jsonl", "wieght": 2}], r"unknown key data\.path\[1\]\.wieght\. Did you mean 'weight'"),
        ([{"weight": 2}], r"^data\.path\[0\] has no path"),
        ([["a.jsonl"]], r"^data\.path\[0\] must be a path, a table"),
        *(([{"path": "a.jsonl", "weight": w}], r"^data\.path\[0\]\.weight: Input should be ") for w in WEIGHTS),
    ],
)
def test_a_list_that_is_wrong_is_refused(path: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        normalized(path)
    assert "\n" not in str(caught.value)


def test_a_weight_that_leaves_no_row_and_a_source_that_is_too_small_are_errors() -> None:
    a, b = prompts("a.jsonl", A), prompts("b.jsonl", B[:2])
    with pytest.raises(DataError, match=r"^weight 0\.01 leaves none of the 20 training rows of a\.jsonl"):
        divided([{"path": a, "weight": 0.01}, b])
    with pytest.raises(DataError, match=r"^b\.jsonl: holding out 2 of 2 rows leaves none to train on"):
        divided([a, b], size=5)


def test_a_copy_is_the_same_row_and_not_an_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    path = [{"path": prompts("a.jsonl", ["x", "x"]), "weight": 2}]
    for in_memory in (20_000, 1):
        monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
        assert spool.copies(divided(path).train) == [0, 0, 1, 1]
        assert spool.copies(divided(path).train[1:]) == [0, 0, 1]


def test_held_out_rows_are_not_those_of_a_training_file(tmp_path: Path) -> None:
    prompts("set/train.jsonl", ["x"]), prompts("set/test.jsonl", ["y"]), prompts("a.jsonl", ["z"])
    Path("link.jsonl").symlink_to("a.jsonl")

    for trained, held_out in (
        ("a.jsonl", "./a.jsonl"),
        ("a.jsonl", str(tmp_path / "a.jsonl")),
        ("a.jsonl", "link.jsonl"),
        (["set", "a.jsonl"], "a.jsonl"),
        ("set", "set/../set"),
        ("set", "set/train.jsonl"),
        ("set/train.jsonl", "set"),
        ("someone/data", "someone/data"),
    ):
        with pytest.raises(ConfigError, match="data.eval_path is the training data"):
            check_splits(DataConfig(path=trained, eval_path=held_out))
    check_splits(DataConfig(path="set", eval_path="set/test.jsonl"))
    check_splits(DataConfig(path="set", eval_path="set", eval_split="test"))
    check_splits(DataConfig(path="someone/data", eval_path="someone/data", eval_split="test"))
    check_splits(DataConfig(path=[{"path": "someone/data", "name": "maths"}], eval_path="someone/data"))


def test_the_command_line_repeats_data(tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    from alignkit.cli import main

    pairs = [{"prompt": f"q{n}", "chosen": "x", "rejected": "y"} for n in range(8)]
    rankings = [{"prompt": f"p{n}", "responses": ["x", "y", "z"], "ranks": [0, 1, 1]} for n in range(8)]
    write("a.jsonl", rankings), write("b.jsonl", pairs)
    given = ["--plugin", "rm", "--model", str(tiny_model()), "rm.policy=base"]

    assert main(["check", *given, "--data", "a.jsonl", "--data", "b.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "       data  8 rows from a.jsonl (format ranking)\n       data  8 rows from b.jsonl (format pref" in printed
    assert main(["check", *given, "rm.data.path=[{path: a.jsonl, weight: 2}, b.jsonl]"]) == 0
    assert "8 rows from a.jsonl (format ranking, weight 2)" in (printed := capsys.readouterr().out)
    assert "training  21 rows" in printed
    assert main(["check", *given, "data.path=[]"]) == 2
    assert capsys.readouterr().err.strip() == "alignkit: error: data.path is an empty list"
