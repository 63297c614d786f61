"""Random numbers of online stages depend on the place in a run alone; evaluations change none of training."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from alignkit.online import seeds
from alignkit.training.randomness import undisturbed


def test_each_iteration_and_each_purpose_in_it_has_a_seed_of_its_own() -> None:
    purposes = range(seeds.SHUFFLE, seeds.SAMPLE + seeds.REDRAWS + 1)
    runs: list[Any] = [SimpleNamespace(seed=seed) for seed in (0, 1, 42)]
    found = [seeds.seed(*place) for place in itertools.product(runs, range(50), purposes)]

    assert len({*found}) == len(found) == 3 * 50 * 6


def test_each_pass_has_every_prompt_once_in_an_order_of_its_own_wherever_a_run_resumes() -> None:
    whole = seeds.shuffled_passes(7, 0, 21, seed=1)
    passes = [whole[:7], whole[7:14], whole[14:]]

    assert [sorted(each) for each in passes] == [[*range(7)]] * 3
    assert len({tuple(each) for each in passes}) == 3
    assert all(seeds.shuffled_passes(7, first, 4, seed=1) == whole[first:][:4] for first in range(17))
    assert seeds.shuffled_passes(7, 0, 21, seed=99) != whole


def test_a_process_draws_the_numbers_that_one_process_would() -> None:
    """After those of the answers that processes before it sample."""
    seeds.set_seeds(5, before=0, length=3)
    whole = torch.rand(4, 3, dtype=torch.double)
    seeds.set_seeds(5, before=2, length=3)

    assert torch.equal(torch.rand(2, 3, dtype=torch.double), whole[2:])


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_what_draws_in_an_evaluation_changes_no_number_of_training() -> None:
    transformers.set_seed(3)
    expected = [drawn(), drawn()]
    transformers.set_seed(3)
    first = drawn()
    with undisturbed():
        drawn()

    assert [first, drawn()] == expected
