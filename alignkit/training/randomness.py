"""Keeps evaluation from changing the random numbers of training, and alignkit from changing those of a session."""

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
    """Restore the random states of Python, NumPy and torch afterwards, on the CPU and on the current GPU."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if not gpus:  # GPUs that were not in use before have drawn nothing
            torch.cuda.manual_seed_all(torch.initial_seed())


def evaluate_undisturbed(trainer: transformers.Trainer) -> None:
    """Make ``trainer.evaluate`` restore the random state, so that evaluating more often changes no weight.

    Evaluation draws random numbers: a data loader draws a seed when it starts, and a stage may sample answers.
    """
    evaluate = trainer.evaluate

    @functools.wraps(evaluate)
    def undisturbing(*args: Any, **kwargs: Any) -> Any:
        with undisturbed():
            return evaluate(*args, **kwargs)

    trainer.evaluate = undisturbing
