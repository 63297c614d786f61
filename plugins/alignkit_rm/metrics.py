"""How good a reward model is, from the scores of held-out rankings. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkit.evaluation import error_bar

Array = NDArray[Any]


def evaluate(
    scores: Array, ranks: Array, lengths: Array, scale: float = 1.0, prompts: Sequence[int] | None = None
) -> dict[str, float]:
    """Metrics of groups: ``scores``, ``ranks`` and ``lengths`` [G, K]; a negative rank is padding.

    ``prompts`` [G] numbers the prompt of each group, where several groups have one.

    - ``accuracy``: the share of pairs (ties left out) whose better answer has the higher score, with its standard error
      over prompts, since the pairs of a prompt are not independent; ``accuracy_distance_1``, ``_2``, ``_3plus``: of
      pairs so many ranks apart;
    - ``ece``: the expected calibration error in ten bins, which is how far sigmoid(difference * ``scale``) is from the
      share of right pairs;
    - ``length_correlation``: Pearson's, of score and answer length within a prompt; ``length_accuracy``: that of the
      better of "longer wins" and "shorter wins";
    - ``score_mean`` and ``score_std``: over answers.
    """
    right, confidence, distance, group, longer = [], [], [], [], []
    centred: list[tuple[float, float]] = []
    numbers = range(len(scores)) if prompts is None else prompts
    for number, score, rank, length in zip(numbers, scores, ranks, lengths, strict=True):
        there = rank >= 0
        score, length = score[there], length[there]
        place = np.unique(rank[there], return_inverse=True)[1]
        better, worse = np.nonzero(place[:, None] < place[None, :])
        difference = (score[better] - score[worse]) * scale
        right += list((difference > 0) + 0.5 * (difference == 0))
        confidence += list(difference)
        distance += list(place[worse] - place[better])
        group += [number] * len(better)
        longer += list((length[better] > length[worse]) + 0.5 * (length[better] == length[worse]))
        centred += list(zip(score - score.mean(), length - length.mean(), strict=True))
    correct, apart, of, by_length = (np.array(values) for values in (right, distance, group, longer))
    everything = scores[ranks >= 0]
    metrics = {
        "accuracy": float(correct.mean()),
        **error_bar("accuracy_error", correct, of),
        "pairs": float(len(correct)),
        "ece": _calibration_error(np.array(confidence)),
        "length_correlation": _correlation(*np.array(centred).T),
        "length_accuracy": float(max(by_length.mean(), 1 - by_length.mean())),
        "score_mean": float(everything.mean()),
        "score_std": float(everything.std()),
    }
    for name, chosen in (("1", apart == 1), ("2", apart == 2), ("3plus", apart >= 3)):
        if chosen.any():
            metrics[f"accuracy_distance_{name}"] = float(correct[chosen].mean())
    return metrics


def verdict(metrics: dict[str, float]) -> str:
    """One line: whether this reward is usable for PPO, and why not."""
    accuracy, error = metrics["eval_accuracy"], metrics.get("eval_accuracy_error")
    if error is None:
        return "usability for PPO is unknown: one held-out prompt is not enough"
    told = f"{accuracy:.1%} ± {error:.1%} of {metrics['eval_pairs']:.0f} held-out pairs are ordered rightly"
    if accuracy - 2 * error <= 0.5:
        return f"not usable for PPO: {told}, which is no better than chance"
    cautions = []
    if accuracy <= metrics["eval_length_accuracy"]:
        cautions.append(f"length alone orders {metrics['eval_length_accuracy']:.1%}")
    if abs(metrics["eval_length_correlation"]) > 0.7:
        cautions.append(f"the score follows length (correlation {metrics['eval_length_correlation']:.2f})")
    if metrics["eval_ece"] > 0.15:
        cautions.append(f"score differences are poorly calibrated (calibration error {metrics['eval_ece']:.2f})")
    return f"usable for PPO with care: {told}, but {'; '.join(cautions)}" if cautions else f"usable for PPO: {told}"


def _calibration_error(difference: Array) -> float:
    sure = 1 / (1 + np.exp(-np.abs(difference)))
    correct = (difference > 0) + 0.5 * (difference == 0)
    bins = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    return float(sum(abs((sure - correct)[bins == b].sum()) for b in range(10)) / len(difference))


def _correlation(a: Array, b: Array) -> float:
    spread = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread else 0.0
