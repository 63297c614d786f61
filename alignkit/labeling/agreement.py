"""Agreement between labelers, or between a judge and people: of pairs, Krippendorff's alpha, and Cohen's kappa.

A ranking is a list of ranks, one for each answer: lower is better, equal ranks are a tie.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

RESAMPLES = 1000  # of the bootstrap


class Agreement(NamedTuple):
    """The share of pairs of answers that two labelers order alike."""

    share: float  # 0 to 1; NaN if there are no pairs
    error: float  # its standard error; NaN if fewer than two items have pairs
    pairs: int  # pairs of answers that two labelers ordered, ties left out


def pair_agreement(items: Iterable[Sequence[Sequence[float]]]) -> Agreement:
    """The share of pairs that two labelers order alike, as InstructGPT reports it (arXiv 2203.02155, section 3.4).

    ``items`` has the rankings of each item, one for each of its labelers. A pair of answers counts once for each two
    labelers of its item, unless one of them ties it. The standard error is that of a bootstrap over items, because the
    pairs of an item are not independent.
    """
    counted = [counts for rankings in items if (counts := _alike(rankings))[1]]
    if not counted:
        return Agreement(math.nan, math.nan, 0)
    import numpy as np  # not at the top: only a report needs it

    alike, pairs = np.array(counted).T
    share = float(alike.sum() / pairs.sum())
    if len(counted) < 2:
        return Agreement(share, math.nan, int(pairs.sum()))
    generator = np.random.default_rng(0)  # the same rankings give the same error
    resampled = (generator.integers(len(counted), size=len(counted)) for _ in range(RESAMPLES))
    shares = [alike[index].sum() / pairs[index].sum() for index in resampled]
    return Agreement(share, float(np.std(shares, ddof=1)), int(pairs.sum()))


def _alike(rankings: Sequence[Sequence[float]]) -> tuple[int, int]:
    """The pairs of answers of one item that two labelers order alike, and all pairs that both order."""
    products = [
        first * second
        for orders in _pairs_of_answers(rankings)
        for first, second in itertools.combinations(orders, 2)
        if first and second
    ]
    return products.count(1), len(products)


def _pairs_of_answers(rankings: Sequence[Sequence[float]]) -> Iterable[list[int]]:
    """For each pair of answers, its order by each labeler: 1: the first is better, -1: the second is, 0: a tie."""
    for i, j in itertools.combinations(range(len(rankings[0]) if rankings else 0), 2):
        yield [(ranks[i] < ranks[j]) - (ranks[i] > ranks[j]) for ranks in rankings]


def preferences(items: Iterable[Sequence[Sequence[float]]]) -> list[list[int]]:
    """The units of :func:`krippendorff_alpha` for rankings: pairs of answers, with one value for each labeler.

    The value is 1 if the first answer is better, -1 if the second is, 0 for a tie. Each pair stands there in both
    directions, so that the order of the answers in a file has no influence.
    """
    pairs = [orders for rankings in items for orders in _pairs_of_answers(rankings)]
    return [*pairs, *([-order for order in orders] for orders in pairs)]


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float:
    """Krippendorff's alpha for ordinal values: 1 is perfect agreement, 0 is that of chance.

    ``units`` has the values that labelers gave to each unit; a unit may have any number of values, and one with fewer
    than two does not count. NaN if all values are equal, or if none can be compared.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section E, with the ordinal metric.
    """
    coincidences: Counter[tuple[float, float]] = Counter()
    for values, times in Counter(map(tuple, units)).items():
        for first, second in itertools.permutations(values, 2):
            coincidences[first, second] += times / (len(values) - 1)  # type: ignore[assignment]
    totals: Counter[float] = Counter()
    for (first, _), count in coincidences.items():
        totals[first] += count
    categories = sorted(totals)

    def distance(a: float, b: float) -> float:
        low, high = min(a, b), max(a, b)
        return (sum(totals[c] for c in categories if low <= c <= high) - (totals[low] + totals[high]) / 2) ** 2

    observed = sum(count * distance(*pair) for pair, count in coincidences.items())
    expected = sum(totals[a] * totals[b] * distance(a, b) for a in categories for b in categories)
    return 1 - (sum(totals.values()) - 1) * observed / expected if expected else math.nan


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa of two labelers who put the same N cases into categories: 1 is perfect agreement, 0 is chance.

    NaN if there are no cases, or if both put all of them into one category.

    Raises:
        ValueError: the two have different lengths.

    Source: J. Cohen, A coefficient of agreement for nominal scales (1960).
    """
    if len(first) != len(second):
        raise ValueError(f"the labelers have {len(first)} and {len(second)} cases")
    count = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True))
    of_first, of_second = Counter(first), Counter(second)
    by_chance = sum(of_first[category] * of_second[category] for category in of_first)
    if not count or by_chance == count**2:
        return math.nan
    return (observed / count - by_chance / count**2) / (1 - by_chance / count**2)
