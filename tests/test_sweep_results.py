"""The table and the picture of a sweep: means over seeds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reported_runs import scores, write_lines

from alignkit.evaluation import sweep_results
from alignkit.runs import frontier


def test_means_over_seeds_by_hand(tmp_path: Path) -> None:
    rows = [{"metrics": {"eval_score": score, "eval_score_error": 9.0}} for score in (1.0, 2.0, 6.0)]
    group = sweep_results.Group("kl_coef=0.1", True, [], rows)
    one = sweep_results.Group("kl_coef=0.1", False, [], rows[:1])

    # deviations -2, -1, 3: variance 14 / 2, of the mean of three
    assert sweep_results.mean_of(group, "score") == {"score": 3.0, "score_error": pytest.approx((7 / 3) ** 0.5)}
    assert sweep_results.mean_of(one, "score") == {"score": 1.0, "score_error": 9.0}
    assert sweep_results.mean_of(group._replace(rows=rows[:1]), "score") == {"score": 1.0, "score_error": None}
    assert sweep_results.mean_of(group, "kl") == {"kl": None, "kl_error": None}


def test_a_mean_needs_the_metric_of_all_runs_and_a_picture_leaves_out_groups_without_it(tmp_path: Path) -> None:
    """Such as where a run diverged, or with data.eval_size=0,0.1: some runs have no held-out rows."""

    def group(name: str, *losses: float | None) -> sweep_results.Group:
        return sweep_results.Group(name, True, [], [{"metrics": {"eval_loss": loss}} for loss in losses])

    groups = [group("kept=1", 1.0, 3.0), group("diverged=1", 1.0, None), group("none=1", None, None), group("failed=1")]

    assert [sweep_results.mean_of(each, "loss")["loss"] for each in groups] == [2.0, None, None, None]
    sweep_results.draw(tmp_path, groups, ["loss"])
    picture = (tmp_path / "sweep.svg").read_text()
    assert [each.name for each in groups if each.name in picture] == ["kept=1"]
    sweep_results.draw(tmp_path, groups[1:], ["loss"])


@pytest.mark.parametrize("over_seeds", [False, True])
def test_the_frontier_is_that_of_training_also_after_a_comparison_of_checkpoints(
    tmp_path: Path, over_seeds: bool
) -> None:
    """Its scores can be those of another reward, for one run of several."""
    jobs: list[Any] = [SimpleNamespace(folder=tmp_path / seed) for seed in ("seed=1", "seed=2")[: 1 + over_seeds]]
    for job in jobs:
        job.folder.mkdir()
        write_lines(job.folder / "metrics.jsonl", scores())
    group = sweep_results.Group("kl_coef=0.1", over_seeds, jobs, [])
    before = sweep_results.frontier_of(group)
    write_lines(jobs[0].folder / "frontier.jsonl", [{"step": step, "kl": 9.0, "score": 0.5} for step in (0, 8)])

    assert frontier.points(jobs[0].folder)[0].score == 0.5
    assert sweep_results.frontier_of(group) == before
    assert [point.score for point in before] == [1.5, 2.75]
