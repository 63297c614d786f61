"""Standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def standard_error(values: ArrayLike, group: ArrayLike | None = None) -> float:
    """The standard error of the mean of ``values`` [N].

    With ``group`` [N], only values of different groups are independent, such as pairs of different prompts; this is the
    error of a ratio estimator. Infinite if there is only one value or group.
    """
    import numpy as np  # not at the top: `--help` does not need it

    numbers: NDArray[Any] = np.asarray(values, dtype=float)
    index = np.arange(len(numbers)) if group is None else np.unique(np.asarray(group), return_inverse=True)[1]
    sums = np.bincount(index, weights=numbers - numbers.mean())
    if len(sums) < 2:
        return math.inf
    return float(math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(numbers))


def error_bar(name: str, values: ArrayLike, group: ArrayLike | None = None) -> dict[str, float]:
    """:func:`standard_error` as a metric of that name; empty if it is infinite, which JSON cannot hold."""
    error = standard_error(values, group)
    return {name: error} if math.isfinite(error) else {}


def jackknife(statistic: Callable[[list[Any]], float], values: Sequence[Any], blocks: int = 100) -> float | None:
    """The standard error of a statistic of independent values, such as F1, which is not a mean.

    The statistic is computed again without each value in turn, or without each of ``blocks`` groups of values if there
    are more (Shao and Wu 1989). For a mean of at most ``blocks`` values, this is :func:`standard_error`. None if there
    is only one value.
    """
    count = min(blocks, len(values))
    if count < 2:
        return None
    without = [statistic([v for i, v in enumerate(values) if i % count != block]) for block in range(count)]
    mean = math.fsum(without) / count
    return math.sqrt(math.fsum((each - mean) ** 2 for each in without) * (count - 1) / count)
