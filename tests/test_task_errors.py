"""The errors of lm-eval's metrics, and of the difference of two runs on the same documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignkit.evaluation import standard_error, task_metrics
from alignkit.evaluation.error_bars import jackknife
from alignkit.evaluation.task_metrics import Documents, TaskMetric

pytest.importorskip("lm_eval")


def test_the_paired_error_is_over_documents() -> None:
    """By hand: 4 documents, of which training changed one. The errors of both runs are larger by far."""
    from lm_eval.api.metrics import mean

    def acc(values: list[float], weight: float = 1.0) -> Documents:
        return Documents(weight, dict(enumerate(values)), mean)

    def metric(*parts: Documents) -> TaskMetric:
        return TaskMetric("t", "acc", "none", 0.5, True, 0, 1, list(parts))

    (row,) = task_metrics.rows([metric(acc([1, 0, 1, 1]))], [metric(acc([1, 0, 1, 0]))])
    assert row["error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert row["difference"] == 0.25
    assert row["difference_error"] == pytest.approx(0.25)  # of 0, 0, 0, 1: sqrt(.25 * .75 / 3)

    of_group = [metric(acc([1, 0, 1, 1], 0.8), acc([1, 0], 0.2)), metric(acc([1, 0, 1, 0], 0.8), acc([0, 0], 0.2))]
    (row,) = task_metrics.rows(of_group[:1], of_group[1:])
    assert row["difference"] == pytest.approx(0.8 * 0.25 + 0.2 * 0.5)
    assert row["difference_error"] == pytest.approx(math.hypot(0.8 * 0.25, 0.2 * 0.5))


def test_the_jackknife_is_the_standard_error_of_a_mean_and_of_a_ratio() -> None:
    values = np.random.default_rng(0).normal(size=60).tolist()
    pairs = [(v + 3, 2.0) for v in values]
    ratio = jackknife(lambda p: sum(a for a, _ in p) / sum(b for _, b in p), pairs)

    assert jackknife(lambda v: sum(v) / len(v), values) == pytest.approx(standard_error(values))
    assert ratio == pytest.approx(standard_error(values) / 2)
    many = np.random.default_rng(1).normal(size=950).tolist()  # in 100 blocks
    assert jackknife(lambda v: sum(v) / len(v), many) == pytest.approx(standard_error(many), rel=0.2)
    assert jackknife(sum, [1.0]) is None
