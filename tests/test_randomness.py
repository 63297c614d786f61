"""What an evaluation draws is drawn again by training. That it changes no weight is in ``test_resume.py``."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from alignkit.training.randomness import undisturbed


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(()).item()])
def test_numbers_that_are_drawn_in_an_evaluation_are_drawn_again(draw: Callable[[], float]) -> None:
    """A reward function may use the generators of Python and NumPy."""
    with undisturbed():
        drawn = draw()
    assert draw() == drawn
