"""How sure a mean is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def of_mean(values: ArrayLike, group: ArrayLike | None = None) -> float:
    """The standard error of the mean of ``values`` [N].

    With ``group`` [N], values are independent between groups only, such as the pairs of one prompt (the error of a
    ratio estimator). Infinite where there is but one value or group.
    """
    import numpy as np  # here: `--help` does without

    numbers: NDArray[Any] = np.asarray(values, dtype=float)
    index = np.arange(len(numbers)) if group is None else np.unique(np.asarray(group), return_inverse=True)[1]
    sums = np.bincount(index, weights=numbers - numbers.mean())
    if len(sums) < 2:
        return math.inf
    return float(math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(numbers))


def named(name: str, values: ArrayLike, group: ArrayLike | None = None) -> dict[str, float]:
    """:func:`of_mean` as a metric of that name; none where it is infinite, which JSON has no word for."""
    error = of_mean(values, group)
    return {name: error} if math.isfinite(error) else {}
