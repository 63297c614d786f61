"""Random numbers that are drawn beside training must not change it."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put the generators of Python, NumPy and torch back to where they were, on the CPU and on the current GPU."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def evaluate_undisturbed(trainer: transformers.Trainer) -> None:
    """Make ``trainer.evaluate`` leave training's random numbers alone: how often it is called changes no weight.

    A data loader draws a seed whenever it begins, and a stage may sample answers.
    """
    evaluate = trainer.evaluate

    @functools.wraps(evaluate)
    def undisturbing(*args: Any, **kwargs: Any) -> Any:
        with undisturbed():
            return evaluate(*args, **kwargs)

    trainer.evaluate = undisturbing
