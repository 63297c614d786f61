"""Errors of checkpoints that cannot be read, such as one with damaged files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import AlignkitError, one_line
from alignkit.models.transformers_internals import CHECKPOINT_READERS
from alignkit.registry.blame import culprit


def name_in_errors(trainer: Any, checkpoint: Path) -> None:
    """Have a trainer name the checkpoint that it resumes from, if it cannot read it."""
    for method in CHECKPOINT_READERS:
        setattr(trainer, method, _naming(getattr(trainer, method), checkpoint))


def _naming(read: Callable[..., Any], checkpoint: Path) -> Callable[..., Any]:
    @functools.wraps(read)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return read(*arguments, **keywords)
        except (AlignkitError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if culprit(error):  # a plugin, which the command line names
                raise
            raise AlignkitError(
                f"cannot resume from {checkpoint}: {one_line(error)}. Delete this folder to resume from an earlier "
                "checkpoint, or start again with --overwrite"
            ) from error

    return call
