"""Standard errors of means."""

from __future__ import annotations

import math
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
