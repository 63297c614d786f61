"""Numbers as text: with as many digits as their errors justify."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

PROBABILITIES = ("accuracy", "eos_rate", "win_rate", "clip_fraction")  # shown in percent
NAMES = {"kl": "KL", "approx_kl": "approximate KL", "kl_coef": "KL coefficient", "eos_rate": "ended", "ece": "ECE"}
Z = 1.96  # of a normal distribution, 95% lie within this many standard deviations


class Measured(NamedTuple):
    """A number and its standard error, if that is known."""

    value: float
    error: float | None = None


def mean(values: Sequence[float]) -> Measured:
    """The mean of independent values [N > 0], with its standard error if there are two or more."""
    average = math.fsum(values) / len(values)
    if len(values) < 2:
        return Measured(average)
    variance = math.fsum((value - average) ** 2 for value in values) / (len(values) - 1)
    return Measured(average, math.sqrt(variance / len(values)))


def difference(before: Measured, after: Measured) -> Measured:
    """``after - before``, with the error of independent measurements. It is unknown if one of the two errors is."""
    if before.error is None or after.error is None:
        return Measured(after.value - before.value)
    return Measured(after.value - before.value, math.hypot(before.error, after.error))


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate over ``count`` trials. Unlike rate ± error, it is not empty at 0 and 1."""
    centre = rate + Z**2 / (2 * count)
    spread = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def is_probability(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric in PROBABILITIES or metric.startswith("accuracy_")


def label(metric: str) -> str:
    """The name of a metric as words."""
    return NAMES.get(metric, metric.replace("_", " "))


def text(number: Measured, percent: bool = False, sign: bool = False) -> str:
    """Such as ``"1.13 ± 0.23"``: two digits of the error, and as many decimals of the value."""
    scale, unit = (100.0, "%") if percent else (1.0, "")
    value = number.value * scale
    error = None if number.error is None or not math.isfinite(number.error) else number.error * scale
    if not math.isfinite(value):
        return "not a number"
    if error:
        decimals = max(0, 1 - math.floor(math.log10(error)))
    elif percent:
        decimals = 1
    else:
        decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    if decimals > 6 or abs(value) >= 1e7:
        shown = f"{value:{'+' if sign else ''}.3g}" + ("" if error is None else f" ± {error:.2g}")
    else:
        shown = f"{value:{'+' if sign else ''}.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")
    return shown.replace("-", "−") + unit


def duration(seconds: float) -> str:
    """Such as ``"6 min 8 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_of_hour:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(number_of_bytes: float) -> str:
    """Such as ``"5.2 GB"``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number_of_bytes < 1000:
            return f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1000
    return f"{number_of_bytes:.3g} TB"


def count(number: int, noun: str) -> str:
    """Such as ``"1 run"`` and ``"2 runs"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
