"""The reward model by hand: losses, pairs merged into groups, held-out metrics, the verdict."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from alignkit import NoConfig, RankedScores, Ranking
from alignkit.data.encoding import Branches, Ranked
from alignkit_rm import losses, metrics, pairs
from alignkit_rm.config import BradleyTerryConfig
from alignkit_rm.groups import merge_pairs
from alignkit_rm.trainer import collate, ranked_scores


def batch(scores: list[float], rank: list[float], group: list[int] | None = None, margin: Any = None) -> RankedScores:
    return RankedScores(
        torch.tensor(scores, requires_grad=True),
        torch.tensor(group or [0] * len(scores)),
        torch.tensor(rank),
        None if margin is None else torch.tensor(margin),
    )


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_bradley_terry_is_the_mean_over_pairs_then_over_groups() -> None:
    # group 0: 2 > 1 > 0 (three pairs); group 1: 3 > 0.5 (one pair)
    both = batch([1.0, 2.0, 0.0, 3.0, 0.5], [1, 0, 2, 0, 1], [0, 0, 0, 1, 1])
    first = (softplus(-1) + softplus(-1) + softplus(-2)) / 3
    second = softplus(-2.5)

    assert losses.bradley_terry(BradleyTerryConfig())(both).loss.item() == pytest.approx((first + second) / 2)


def test_ties_make_no_pair() -> None:
    loss = losses.bradley_terry(BradleyTerryConfig())(batch([1.0, 5.0, 0.0], [0, 0, 1])).loss

    assert loss.item() == pytest.approx((softplus(-1) + softplus(-5)) / 2)


def test_a_margin_is_what_a_pair_must_differ_by() -> None:
    scores = batch([1.0, 0.0], [0, 1], margin=[3.0, 0.5])

    assert losses.bradley_terry(BradleyTerryConfig())(scores).loss.item() == pytest.approx(softplus(-(1 - 2.5)))
    assert losses.bradley_terry(BradleyTerryConfig(margin=False))(scores).loss.item() == pytest.approx(softplus(-1))


def test_centering_adds_the_square_of_the_sum() -> None:
    loss = losses.bradley_terry(BradleyTerryConfig(centering=0.1))(batch([2.0, 1.0], [0, 1])).loss

    assert loss.item() == pytest.approx(softplus(-1) + 0.1 * 9)


def test_at_k_2_the_loss_is_trls() -> None:
    """TRL's: -logsigmoid(chosen - rejected).mean(), with its margin and its centering, on the same scores."""
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 64).double()
    trl = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    ours = RankedScores(
        scores=torch.stack([chosen, rejected], 1).flatten(),
        group=torch.arange(64).repeat_interleave(2),
        rank=torch.tensor([0, 1]).repeat(64),
        margin=torch.stack([margin, torch.zeros(64)], 1).flatten(),
    )
    loss = losses.bradley_terry(BradleyTerryConfig(centering=0.01))(ours).loss

    assert abs(loss.item() - trl.item()) < 1e-6


def test_plackett_luce_draws_the_best_of_the_rest() -> None:
    # 2 first of {2, 1, 0}, then 1 of {1, 0}
    first = math.log(math.exp(2) + math.exp(1) + math.exp(0)) - 2
    second = math.log(math.exp(1) + math.exp(0)) - 1
    loss = losses.plackett_luce(NoConfig())(batch([1.0, 2.0, 0.0], [1, 0, 2])).loss

    assert loss.item() == pytest.approx((first + second) / 2)


def test_plackett_luce_draws_the_best_even_if_it_scores_lowest() -> None:
    batch = RankedScores(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), torch.tensor([0.0, 1.0]))

    assert losses.plackett_luce(NoConfig())(batch).loss.item() == pytest.approx(math.log(1 + math.exp(2)))


def test_plackett_luce_of_pairs_is_bradley_terry() -> None:
    pairs = batch([1.0, 0.3, -2.0, 0.7], [0, 1, 1, 0], [0, 0, 1, 1])

    assert losses.plackett_luce(NoConfig())(pairs).loss.item() == pytest.approx(
        losses.bradley_terry(BradleyTerryConfig())(pairs).loss.item()
    )


# --- groups ----------------------------------------------------------------------------------------------------------


def pair(better: str, worse: str, prompt: str = "p") -> Ranking:
    return Ranking([{"role": "user", "content": prompt}], [better, worse], [0.0, 1.0])


def told(rankings: list[Ranking]) -> list[dict[str, float]]:
    return [dict(zip(r.answers, r.ranks, strict=True)) for r in rankings]


def test_pairs_of_one_prompt_become_one_ranking() -> None:
    assert told(merge_pairs([pair("a", "b"), pair("b", "c"), pair("x", "y", "q"), pair("a", "c")])) == [
        {"a": 0, "b": 1, "c": 2},
        {"x": 0, "y": 1},
    ]
    assert told(merge_pairs([pair("a", "b"), pair("a", "c")])) == [{"a": 0, "b": 1, "c": 1}]


@pytest.mark.parametrize("k", [4, 9])
def test_all_pairs_of_a_ranking_become_that_ranking_in_any_order(k: int) -> None:
    answers = [f"answer {rank}" for rank in range(k)]
    pairs = [pair(*two) for two in itertools.combinations(answers, 2)]

    for seed in range(5):
        assert told(merge_pairs(random.Random(seed).sample(pairs, len(pairs)))) == [
            {answer: rank for rank, answer in enumerate(answers)}
        ]


def test_pairs_that_no_ranking_says_stay_apart() -> None:
    assert told(merge_pairs([pair("a", "b"), pair("c", "d")])) == [{"a": 0, "b": 1}, {"c": 0, "d": 1}]
    assert told(merge_pairs([pair("a", "b"), pair("b", "a")])) == [{"a": 0, "b": 1}, {"b": 0, "a": 1}]


def test_each_vote_for_a_pair_counts() -> None:
    """Nine labelers against one are not one against one."""
    votes = [*[pair("a", "b")] * 9, pair("b", "a")]
    rankings = told(merge_pairs([*votes, pair("b", "c")]))

    assert rankings.count({"a": 0, "b": 1, "c": 2}) == 1
    assert rankings.count({"a": 0, "b": 1}) == 8
    assert rankings.count({"b": 0, "a": 1}) == 1
    assert len(rankings) == 10


def test_pairs_with_margins_stay_as_they_are() -> None:
    rows = [Ranking(pair("a", "b").prompt, ["a", w], [0.0, 1.0], [m, 0.0]) for w, m in (("b", 1.0), ("c", 2.0))]

    assert merge_pairs(rows) == rows


def test_a_batch_may_hold_groups_of_different_k_and_some_margins() -> None:
    groups = [
        Ranked([], Branches([1], [[2], [3, 3], [4]]), [5.0, 1.0, 5.0]),
        Ranked([], Branches([1], [[2], [3]]), [0.0, 1.0], [2.0, 0.0]),
    ]
    scores = ranked_scores(groups, torch.arange(5.0))

    assert scores.group.tolist() == [0, 0, 0, 1, 1]
    assert scores.rank.tolist() == [5, 1, 5, 0, 1]
    assert scores.margin is not None
    assert scores.margin.tolist() == [0, 0, 0, 2, 0]
    assert collate(groups)["labels"].tolist() == [
        [[1, 1], [0, 2], [1, 1]],
        [[0, 1], [1, 1], [-1, -1]],
    ]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    ranks = np.array([[0, 1, 2], [0, 1, -1]])
    lengths = np.array([[9, 6, 3], [4, 4, -1]])
    found = metrics.evaluate(scores, ranks, lengths)

    assert found["pairs"] == 4
    assert found["accuracy"] == 3 / 4
    # deviations of the groups' sums from the mean: 3 - 3 * .75 = .75 and 0 - .75
    assert found["accuracy_error"] == pytest.approx(math.sqrt(2 * 0.75**2 * 2) / 4)
    assert found["accuracy_distance_1"] == pytest.approx(2 / 3)
    assert found["accuracy_distance_2"] == 1
    assert found["length_correlation"] == pytest.approx(1 - 0.1, abs=0.12)
    assert found["length_accuracy"] == pytest.approx(3.5 / 4)
    assert found["score_mean"] == pytest.approx(7 / 5)


def test_calibration_is_zero_where_confidence_is_right() -> None:
    difference = math.log(3)  # sigmoid gives 3/4: right three times in four
    scores = np.array([[difference, 0.0]] * 3 + [[0.0, difference]])
    found = metrics.evaluate(scores, np.array([[0, 1]] * 4), np.ones((4, 2)))

    assert found["ece"] == pytest.approx(0, abs=1e-9)
    assert metrics.evaluate(scores * 100, np.array([[0, 1]] * 4), np.ones((4, 2)))["ece"] == pytest.approx(0.25)
    assert metrics.evaluate(scores * 100, np.array([[0, 1]] * 4), np.ones((4, 2)), scale=0.01)["ece"] < 1e-9


def test_pairs_by_distance_and_their_calibration_by_hand() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    ranks = np.array([[0, 5, 7], [0, 1, -1]])  # distances count ranks that answers of the prompt have
    of = pairs.pairs_of(scores, ranks, np.ones((2, 3)))
    sigmoid_1, sigmoid_2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    # three pairs, two of them right and of the first prompt: the prompts' sums differ from the mean by 2 - 2 * 2/3
    # and 0 - 2/3
    error = pytest.approx(math.sqrt(2 * (2 / 3) ** 2 * 2) / 3)

    assert pairs.by_distance(of) == [
        {"distance": 1, "pairs": 3, "accuracy": pytest.approx(2 / 3), "error": error},
        {"distance": 2, "pairs": 1, "accuracy": 1.0, "error": None},
    ]
    assert pairs.calibration(of) == [
        {"predicted": pytest.approx(sigmoid_1), "observed": pytest.approx(2 / 3), "error": error, "pairs": 3},
        {"predicted": pytest.approx(sigmoid_2), "observed": 1.0, "error": None, "pairs": 1},
    ]
    assert pairs.calibration_error(of) == pytest.approx((3 * (sigmoid_1 - 2 / 3) + (1 - sigmoid_2)) / 4)
    measured = metrics.evaluate(scores, ranks, np.ones((2, 3)))
    assert measured["accuracy_distance_1_error"] == error
    assert "accuracy_distance_2_error" not in measured


def test_equal_scores_predict_one_half_and_extreme_ones_one() -> None:
    of = pairs.pairs_of(np.array([[1.0, 1.0], [900.0, 0.0]]), np.array([[0, 1]] * 2), np.ones((2, 2)))

    assert [(row["predicted"], row["observed"]) for row in pairs.calibration(of)] == [(0.5, 0.5), (1.0, 1.0)]
    assert [row["accuracy"] for row in pairs.by_distance(of)] == [0.75]


def test_a_certain_pair_is_in_the_bin_of_almost_certain_ones() -> None:
    of = pairs.pairs_of(np.array([[900.0, 0.0], [3.0, 0.0]]), np.array([[0, 1]] * 2), np.ones((2, 2)))

    assert [row["predicted"] for row in pairs.calibration(of)] == [pytest.approx((1 + 1 / (1 + math.exp(-3))) / 2)]


def judged(**changed: float) -> str:
    good = {"accuracy": 0.8, "accuracy_error": 0.02, "pairs": 400, "ece": 0.05}
    good |= {"length_correlation": 0.2, "length_accuracy": 0.55}
    return metrics.verdict({f"eval_{name}": value for name, value in {**good, **changed}.items()})


def test_the_verdict_says_whether_and_why_not() -> None:
    assert judged() == "usable for PPO: pairwise accuracy 80.0% ± 2.0% on 400 held-out pairs"
    assert "not usable for PPO" in judged(accuracy=0.53)
    assert "no better than chance" in judged(accuracy=0.8, accuracy_error=0.2)
    assert "with care" in judged(length_accuracy=0.9)
    assert "length alone reaches 90.0%" in judged(length_accuracy=0.9)
    assert "correlates with length (-0.90)" in judged(length_correlation=-0.9)
    assert "poorly calibrated (ECE 0.30)" in judged(ece=0.3)
