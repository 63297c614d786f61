"""``answers.jsonl`` keeps the answers of every evaluation, and earlier versions' tables are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.rows import Conversation
from alignkit.runs import answers

PROMPTS: list[Conversation] = [[{"role": "user", "content": text}] for text in ("a\u2028b", "c")]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / answers.FILE).read_text(encoding="utf-8").split("\n")[:-1]]


def test_evaluations_are_kept_by_step_and_one_at_the_same_step_replaces_the_other(tmp_path: Path) -> None:
    answers.write(tmp_path, 0, PROMPTS, ["x", "y"])
    answers.write(tmp_path, 4, PROMPTS, ["lost", "lost"], score=[1.0, 2.0])
    scores = [0.123456789, float("nan")]
    answers.write(tmp_path, 4, PROMPTS, ["z\n", "é"], score=scores, length=[3, 4], ended=[True, False])

    assert lines(tmp_path)[2:] == [
        {"step": 4, "prompt": "a\u2028b", "answer": "z\n", "score": 0.123457, "length": 3, "ended": True},
        {"step": 4, "prompt": "c", "answer": "é", "score": None, "length": 4, "ended": False},
    ]
    first, last = answers.read(tmp_path)
    assert first == (0, ["a\u2028b", "c"], ["x", "y"], {})
    assert last.columns == {"score": [0.123457, None], "length": [3, 4], "ended": [True, False]}
    assert answers.read(tmp_path / "nothing") == []


def test_a_resumed_run_drops_the_answers_after_its_checkpoint(tmp_path: Path) -> None:
    for step in (0, 2, 4):
        answers.write(tmp_path, step, PROMPTS, ["x", "y"], kl=[step / 10, 1e-7])
        if step == 2:
            kept = (tmp_path / answers.FILE).read_bytes()

    answers.keep_until(tmp_path, 3)
    assert (tmp_path / answers.FILE).read_bytes() == kept


def test_lines_that_are_cut_or_foreign_are_left_out(tmp_path: Path) -> None:
    answers.write(tmp_path, 2, PROMPTS, ["x", "y"])
    with (tmp_path / answers.FILE).open("a", encoding="utf-8") as file:
        file.write('[1]\n{"step": "4", "prompt": "a", "answer": "b"}\n{"step": 5, "note": 1}\n{"step": 4, "prom')

    assert answers.read(tmp_path) == [(2, ["a\u2028b", "c"], ["x", "y"], {})]


def test_the_table_of_an_earlier_version_has_its_last_step_from_the_metrics(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "before": "x", "after": "y", "score": 0.5}, {"prompt": "q", "before": "", "after": "z"}]
    (tmp_path / answers.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    logged = [{"step": 0, "eval_score": 0.1}, {"step": 6, "eval_score": 0.2}, {"step": 8, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))

    assert answers.read(tmp_path) == [
        (0, ["p", "q"], ["x", ""], {}),
        (6, ["p", "q"], ["y", "z"], {"score": [0.5, None]}),
    ]
    answers.keep_until(tmp_path, 4)  # resumed from an earlier checkpoint
    assert lines(tmp_path) == [
        {"step": 0, "prompt": "p", "answer": "x"},
        {"step": 0, "prompt": "q", "answer": ""},
    ]


def test_the_table_of_an_earlier_version_that_was_evaluated_only_before_training(tmp_path: Path) -> None:
    row = {"prompt": "p", "before": "x", "after": "x", "kl": 0.0}
    (tmp_path / answers.FILE).write_text(json.dumps(row) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_kl": 0.0}\n')

    assert answers.read(tmp_path) == [(0, ["p"], ["x"], {"kl": [0.0]})]
