"""Agreement of labelers: numbers worked out by hand, or printed in the source of the formula."""

from __future__ import annotations

import math
import random

import pytest

from alignkit.labeling import cohen_kappa, krippendorff_alpha, pair_agreement, preferences


def test_pair_agreement_counts_pairs_that_both_order() -> None:
    items = [
        [[0, 1, 2], [0, 2, 1]],  # they order the last two differently: 2 of 3
        [[0, 0, 1], [1, 0, 2]],  # a tie of the first labeler is left out: 2 of 2
        [[0, 1, 2]],  # one labeler
    ]
    agreement = pair_agreement(items)

    assert agreement.share == pytest.approx(4 / 5)
    assert agreement.pairs == 5
    # resampling the two items gives 2/3, 4/5 (twice) or 1, each as likely
    assert agreement.error == pytest.approx(0.1190, rel=0.1)
    assert pair_agreement(items) == agreement


def test_each_two_of_three_labelers_count() -> None:
    assert pair_agreement([[[0, 1], [0, 1], [1, 0]]])[::2] == (1 / 3, 3)


def test_the_error_of_pair_agreement_is_that_of_independent_items() -> None:
    """With one pair per item, the bootstrap gives the standard error of a share."""
    items = [[[0, 1], [0, 1] if number < 73 else [1, 0]] for number in range(100)]

    assert pair_agreement(items).share == 0.73
    assert pair_agreement(items).error == pytest.approx(math.sqrt(0.73 * 0.27 / 100), rel=0.1)


def test_without_pairs_agreement_is_unknown() -> None:
    assert pair_agreement([]).pairs == 0
    assert math.isnan(pair_agreement([[[0, 1]], [[0, 0], [0, 1]]]).share)
    assert math.isnan(pair_agreement([[[0, 1], [0, 1]]]).error)


KRIPPENDORFF = [  # the units of his example with missing values (2011, section C): four observers, twelve units
    *([1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4]),
    *([4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [5, 5, 5], [1, 1], [3]),
]


def test_alpha_is_that_of_krippendorffs_example() -> None:
    assert krippendorff_alpha(KRIPPENDORFF) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_preferences_by_hand() -> None:
    """Two labelers order 8 of 10 pairs alike. In both directions: 40 values, half of them 1; 8 coincidences differ."""
    items = [[[0, 1], [0, 1] if number < 8 else [1, 0]] for number in range(10)]

    assert krippendorff_alpha(preferences(items)) == pytest.approx(1 - 39 * 8 / (2 * 20 * 20))


def test_a_tie_is_a_smaller_disagreement_than_the_opposite_order() -> None:
    alike = [[[0, 1], [0, 1]]] * 20
    tied, opposite = [[[0, 1], [0, 0]]] * 5, [[[0, 1], [1, 0]]] * 5

    assert krippendorff_alpha(preferences(alike + tied)) > krippendorff_alpha(preferences(alike + opposite))


def test_alpha_does_not_depend_on_the_order_of_the_answers() -> None:
    generator = random.Random(0)
    items = [[[generator.randrange(3) for _ in range(4)] for _ in range(2)] for _ in range(30)]
    reversed_items = [
        [ranks[::-1] for ranks in rankings] if number % 2 else rankings for number, rankings in enumerate(items)
    ]

    assert krippendorff_alpha(preferences(reversed_items)) == pytest.approx(krippendorff_alpha(preferences(items)))
    assert abs(krippendorff_alpha(preferences(items))) < 0.2  # chance


def test_alpha_is_one_for_equal_and_unknown_for_constant_values() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2]]) == 1
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert math.isnan(krippendorff_alpha([[1], []]))


def test_kappa_by_hand() -> None:
    """Of 50 cases 20 + 15 are alike, 0.7. By chance 25/50 * 30/50 + 25/50 * 20/50 = 0.5 would be."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15

    assert cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(first, second[::-1]) < 0
    assert math.isnan(cohen_kappa(["yes"], ["yes"]))
    with pytest.raises(ValueError, match="2 and 1 cases"):
        cohen_kappa([1, 2], [1])
