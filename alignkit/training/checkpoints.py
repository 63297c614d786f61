"""Errors of files of a run that cannot be read or written, such as a damaged checkpoint, or a full disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of a disk that is full or read-only into one that says how to go on.

    Raises:
        AlignkitError: a file in the run folder could not be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AlignkitError) or (reason := _reason(error, folder)) is None:
            raise
        raise AlignkitError(
            f"cannot write to {folder}: {reason}. When it can be written again, continue with --resume"
        ) from error


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _reason(error: Exception, folder: Path) -> str | None:
    """Why the disk could not be written; None if the error has another cause."""
    text = str(error)
    if of_system := re.search(r"\(os error (\d+)\)", text):  # safetensors and tokenizers, which are written in Rust
        error = OSError(int(of_system[1]), os.strerror(int(of_system[1])))
    if isinstance(error, OSError):
        return error.strerror if error.errno in DISK_ERRORS else None
    if "PytorchStreamWriter" not in text and "inline_container.cc" not in text:  # of torch.save
        return None
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    return f"PyTorch could not save a file, and the disk has {free / 2**20:.0f} MB free"
