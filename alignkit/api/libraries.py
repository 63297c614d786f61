"""Settings of the libraries while alignkit uses them: no usage statistics, no warnings, no lasting effects."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator

# variable of the environment -> its value, and the module that reads it when it is imported, with the value there
REQUESTS = {
    "HF_HUB_DISABLE_TELEMETRY": ("1", "huggingface_hub.constants", True),  # TRL's trainers send a usage ping otherwise
    "HF_UPDATE_DOWNLOAD_COUNTS": ("0", "datasets.config", False),  # datasets asks a server for every file that it reads
}


def set_environment() -> None:
    """Turn off requests of libraries that nobody asked for, and threads of tokenizers, unless the user set them."""
    for variable, (value, module, constant) in REQUESTS.items():
        if os.environ.setdefault(variable, value) == value and module in sys.modules:
            setattr(sys.modules[module], variable, constant)
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # Transformers asks a server to convert other weights
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Use the libraries without their warnings and progress bars.

    Afterwards the memory of models is freed, and the random states are those of before.

    ``ALIGNKIT_DEBUG`` keeps warnings, progress bars, and the variables of an error's frames, which hold models.
    """
    from alignkit.training.randomness import undisturbed

    set_environment()
    debug = bool(os.environ.get("ALIGNKIT_DEBUG"))
    try:
        with undisturbed(), contextlib.nullcontext() if debug else quiet_libraries():
            yield
    except BaseException as error:
        if not debug:
            _clear_frames(error)
        raise
    finally:
        _free_memory()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the warnings and progress bars of libraries."""
    import datasets
    import transformers

    log, bitsandbytes = transformers.utils.logging, logging.getLogger("bitsandbytes")
    verbosity, level = log.get_verbosity(), bitsandbytes.level
    bars = log.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        bitsandbytes.setLevel(level)
        if bars[0]:
            log.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()


def _clear_frames(error: BaseException) -> None:
    """Drop the variables in the frames of an error, such as models: a notebook keeps its last error."""
    errors, seen = [error], set[int]()
    while errors:
        each = errors.pop()
        if id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            errors += [cause for cause in (each.__cause__, each.__context__) if cause is not None]


def _free_memory() -> None:
    gc.collect()  # trainers have reference cycles
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()  # does nothing without CUDA
