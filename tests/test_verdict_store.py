"""The store of verdicts: shared by processes, and one line if its file cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit import AlignkitError, Question
from alignkit.judging.store import Store, key_of

PAIR = Question([{"role": "user", "content": "p"}], ("a", "b"))


def test_a_verdict_is_seen_by_other_stores_on_the_file_at_once(tmp_path: Path) -> None:
    first, second = (Store(tmp_path / "folder" / "verdicts.sqlite") for _ in range(2))
    first.write("a", [0, 1])
    second.write("b", None)
    second.write("a", [1, 0])

    assert first.read(["a", "b", "c"]) == {"a": [1, 0], "b": None}


def test_the_key_depends_on_the_judge_the_prompt_the_answers_and_their_order() -> None:
    questions = [PAIR, Question(PAIR.prompt, ("b", "a")), Question([{"role": "system", "content": "p"}], ("a", "b"))]
    keys = {key_of(identity, question) for identity in ("one", "other", None) for question in questions}

    assert len(keys) == 9
    assert key_of("one", PAIR) == key_of("one", Question([{"content": "p", "role": "user"}], ("a", "b")))


def test_a_file_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "verdicts.sqlite").write_text("something else " * 100)
    with pytest.raises(AlignkitError, match=r"verdicts.sqlite: file is not a database. Remove the file, or set XDG"):
        Store(tmp_path / "verdicts.sqlite")
    with pytest.raises(AlignkitError, match="verdicts cannot be stored in .*File exists"):
        Store(tmp_path / "verdicts.sqlite" / "below")
