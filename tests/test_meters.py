"""Metrics between two logs: exact weighted means and totals, and nothing in a step that waits for the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import Waits

from alignkit.training.meters import Means, RowMetrics, last_logged


def test_a_mean_is_weighted_by_the_size_of_its_parts() -> None:
    means = Means(Accelerator(cpu=True))
    means.add({"nll": torch.tensor(2.0), "accuracy": 1}, weight=3)
    means.add({"nll": torch.tensor([4.0], dtype=torch.bfloat16), "accuracy": 0.5}, weight=torch.tensor(1))
    means.add({"once": 7})
    means.count(tokens=torch.tensor(2**24), rows=1)  # where adding 1 to fp32 does nothing
    means.count(tokens=1, rows=torch.tensor(2))

    taken = means.take()
    assert taken == {"nll": (2 * 3 + 4) / 4, "accuracy": (3 + 0.5) / 4, "once": 7, "tokens": 2**24 + 1, "rows": 3}
    assert means.take() == {}


def test_a_part_of_size_zero_does_not_count() -> None:
    means = Means(Accelerator(cpu=True))
    means.add({"nll": 2.0, "empty": torch.tensor(0.0) / 0}, weight=0)
    means.add({"nll": 3.0}, weight=1)

    assert means.take() == {"nll": 3.0}


def test_a_metric_that_is_nan_stays_nan() -> None:
    means = Means(Accelerator(cpu=True))
    means.add({"loss": float("nan")}, weight=2)
    means.add({"loss": 1.0}, weight=2)

    assert means.take() == pytest.approx({"loss": float("nan")}, nan_ok=True)


def test_adding_never_waits_for_the_device() -> None:
    """The meta device has no values to read, as a GPU has none before its work is done."""
    means = Means(SimpleNamespace(device=torch.device("meta")))
    with Waits() as waits:
        means.add({"nll": torch.ones((), device="meta"), "accuracy": 0.5}, torch.ones((), device="meta"))
        means.add({"nll": 1.0}, 3)
        means.count(tokens=5)
        means.count(tokens=torch.ones((), device="meta", dtype=torch.long))

    assert waits.places == []


def test_the_rows_of_an_evaluation_are_all_kept() -> None:
    rows = RowMetrics(Accelerator(cpu=True))
    rows.add({"accuracy": torch.tensor([1.0, 0.0]), "prompt": torch.tensor([0, 1])})
    rows.add({"accuracy": torch.tensor([0.5]), "prompt": torch.tensor([1])})
    taken = rows.take()

    assert taken["accuracy"].tolist() == [1, 0, 0.5]
    assert taken["prompt"].tolist() == [0, 1, 1]
    assert rows.take() == {}


def test_a_total_goes_on_from_the_last_log() -> None:
    state = SimpleNamespace(log_history=[{"num_tokens": 5}, {"num_tokens": 9}, {"eval_loss": 1.0}])

    assert last_logged(state, "num_tokens") == 9
    assert last_logged(state, "other") == 0
