"""The limits of the numbers that Python calls take. They are those of the commands."""

from __future__ import annotations

import math
from typing import Any

from alignkit.errors import ConfigError

LARGEST_SEED = 2**31 - 1  # a batch adds its place to it, and NumPy's seeds end at 2**32


def check_seed(seed: Any) -> None:
    """Check the seed of random numbers.

    Raises:
        ConfigError: it is not a whole number, or out of its limits.
    """
    check_whole(0, LARGEST_SEED, seed=seed)


def check_whole(least: int = 1, most: float = math.inf, **values: Any) -> None:
    """Check that arguments are whole numbers from ``least`` to ``most``.

    Raises:
        ConfigError: one is not.
    """
    for name, value in values.items():
        if type(value) is not int:
            raise ConfigError(f"{name} must be a whole number (got {value!r})")
        _check_limits(name, value, least, most)


def check_number(least: float, most: float = math.inf, **values: Any) -> None:
    """Check that arguments are finite numbers from ``least`` to ``most``.

    Raises:
        ConfigError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"{name} must be a number (got {value!r})")
        _check_limits(name, value, least, most)


def _check_limits(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        limits = f"{least} or more" if most == math.inf else f"between {least} and {most}"
        raise ConfigError(f"{name} must be {limits} (got {value!r})")
