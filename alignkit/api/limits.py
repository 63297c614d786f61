"""Checks numeric arguments of Python calls, as the options of commands are checked. No torch here."""

from __future__ import annotations

import math
import numbers

from alignkit.errors import ConfigError

LARGEST_SEED = 2**32 - 1


def whole(function: str, least: int = 1, most: int | None = None, **arguments: int | None) -> None:
    """Check that arguments are whole numbers from ``least`` to ``most``, or None.

    Raises:
        ConfigError: one is not.
    """
    for name, value in arguments.items():
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is not None and not (is_whole and least <= value <= (math.inf if most is None else most)):
            limits = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise ConfigError(f"{function}: {name} must be a whole number {limits} (got {value!r})")


def number(function: str, least: float, most: float = math.inf, **arguments: float) -> None:
    """Check that arguments are finite numbers from ``least`` to ``most``.

    Raises:
        ConfigError: one is not.
    """
    for name, value in arguments.items():
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and least <= value <= most):
            limits = f"of {least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
            raise ConfigError(f"{function}: {name} must be a number {limits} (got {value!r})")
