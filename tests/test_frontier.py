"""The reward-KL frontier of a run: from its evaluations, and as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.runs import frontier
from alignkit.runs.frontier import Point


def write(file: Path, *rows: Any) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_points_are_the_held_out_evaluations_of_training(tmp_path: Path) -> None:
    write(
        tmp_path / "metrics.jsonl",
        {"step": 0, "eval_score": -1.0, "eval_score_error": 0.2, "eval_kl": 0.0},
        {"step": 4, "score": 0.1, "kl": 0.3},
        {"step": 8, "eval_score": 0.5, "eval_score_error": 0.1, "eval_kl": 2.25, "eval_kl_error": 0.3},
        {"step": 12, "eval_score": float("nan"), "eval_kl": 3.0},
        {"step": 8, "eval_score": 0.4, "eval_kl": 2.0},  # the average or the best policy, after training
        ["no metrics"],
    )
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 16, "eval_sc\xff')  # cut off by a kill

    assert frontier.points(tmp_path) == [
        Point(0, 0.0, None, -1.0, 0.2, None, None),
        Point(8, 2.25, 0.3, 0.5, 0.1, None, None),
    ]
    assert frontier.labels(tmp_path) is None
    assert frontier.points(tmp_path / "nosuch") == []


def test_checkpoints_that_compare_has_evaluated_take_precedence(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 0, "eval_score": -1.0, "eval_kl": 0.0})
    row = {"kl": 4.0, "kl_error": 0.5, "score": 1.0, "score_error": 0.1, "gold": 0.6, "gold_error": 0.05}
    by = {"score_by": "runs/rm", "gold_by": "wins by local", "rewards": [{"name": "function"}, None]}
    write(tmp_path / "frontier.jsonl", {"step": 9, **row, **by}, {"step": 3, **row, "kl": 1.0, **by})

    assert frontier.points(tmp_path) == [Point(3, 1.0, *list(row.values())[1:]), Point(9, *row.values())]
    assert frontier.labels(tmp_path) == ("runs/rm", "wins by local", [{"name": "function"}, None])


@pytest.mark.parametrize("gold", [False, True])
def test_the_picture_has_a_curve_for_each_run_over_the_root_of_the_kl(tmp_path: Path, gold: bool) -> None:
    of_run = [Point(step, step / 2, 0.6, step / 4, 0.1, 0.5 if gold else None, None) for step in (0, 2, 8)]
    series = {"runs/a/ppo": of_run, "runs/b/ppo": of_run[:2]}
    for name in frontier.PICTURES:
        frontier.draw(tmp_path / name, series, "score by runs/rm", "wins by local")
    picture = (tmp_path / "frontier.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", picture)

    assert [text for text in texts if text.startswith("runs/")] == ["runs/a/ppo", "runs/b/ppo"]
    assert texts.count("8") >= 1 + gold  # a step beside its point, in each panel
    assert ("wins by local" in texts) is gold
    assert "score by runs/rm" in texts
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    frontier.draw(tmp_path / "frontier.svg", series, "score by runs/rm", "wins by local")
    assert (tmp_path / "frontier.svg").read_text() == picture  # the same points are the same file


def test_a_kl_of_which_the_estimate_is_negative_counts_as_zero() -> None:
    assert frontier._distance(-0.1) == 0
    assert frontier._distance(6.25) == 2.5
