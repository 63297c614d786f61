"""Metrics of a reward model, from the scores of held-out rankings. NumPy only."""

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

    ``prompts`` [G] are the indices of the groups' prompts, if groups share prompts. Losses were computed on the scores
    times ``scale``.

    - ``accuracy``: the pairwise accuracy, which is the share of pairs (without ties) whose better answer has the higher
      score, with its standard error over prompts, because the pairs of a prompt are not independent;
      ``accuracy_distance_1``, ``_2``, ``_3plus``: that of pairs by distance in rank
    - ``ece``: the expected calibration error in ten bins: how far sigmoid(score difference * ``scale``) is from the
      accuracy
    - ``length_correlation``: Pearson's correlation of score and answer length within a prompt; ``length_accuracy``: the
      accuracy of "longer is better" or "shorter is better", whichever is higher
    - ``score_mean`` and ``score_std``: over answers
    """
    differences, distances, longer, prompt_of_pair = [], [], [], []
    centred: list[tuple[float, float]] = []
    prompts = range(len(scores)) if prompts is None else prompts
    for prompt, score, rank, length in zip(prompts, scores, ranks, lengths, strict=True):
        answers = rank >= 0
        score, length = score[answers], length[answers]
        place = np.unique(rank[answers], return_inverse=True)[1]
        better, worse = np.nonzero(place[:, None] < place[None, :])
        differences += list((score[better] - score[worse]) * scale)
        distances += list(place[worse] - place[better])
        longer += list(_is_higher(length[better] - length[worse]))
        prompt_of_pair += [prompt] * len(better)
        centred += list(zip(score - score.mean(), length - length.mean(), strict=True))
    correct, distance, length_correct = _is_higher(np.array(differences)), np.array(distances), np.array(longer)
    answer_scores = scores[ranks >= 0]
    metrics = {
        "accuracy": float(correct.mean()),
        **error_bar("accuracy_error", correct, np.array(prompt_of_pair)),
        "pairs": float(len(correct)),
        "ece": _calibration_error(np.array(differences)),
        "length_correlation": _correlation(*np.array(centred).T),
        "length_accuracy": float(max(length_correct.mean(), 1 - length_correct.mean())),
        "score_mean": float(answer_scores.mean()),
        "score_std": float(answer_scores.std()),
    }
    for name, pairs in (("1", distance == 1), ("2", distance == 2), ("3plus", distance >= 3)):
        if pairs.any():
            metrics[f"accuracy_distance_{name}"] = float(correct[pairs].mean())
    return metrics


def verdict(metrics: dict[str, float]) -> str:
    """One line: whether PPO can use this reward model, and if not, why."""
    accuracy, error = metrics["eval_accuracy"], metrics.get("eval_accuracy_error")
    if error is None:
        return "usability for PPO is unknown: one held-out prompt is not enough"
    measured = f"pairwise accuracy {accuracy:.1%} ± {error:.1%} on {metrics['eval_pairs']:.0f} held-out pairs"
    if accuracy - 2 * error <= 0.5:
        return f"not usable for PPO: {measured}, which is no better than chance"
    cautions = []
    if accuracy <= metrics["eval_length_accuracy"]:
        cautions.append(f"length alone reaches {metrics['eval_length_accuracy']:.1%}")
    if abs(metrics["eval_length_correlation"]) > 0.7:
        cautions.append(f"the score correlates with length ({metrics['eval_length_correlation']:.2f})")
    if metrics["eval_ece"] > 0.15:
        cautions.append(f"score differences are poorly calibrated (ECE {metrics['eval_ece']:.2f})")
    if cautions:
        return f"usable for PPO with care: {measured}, but {'; '.join(cautions)}"
    return f"usable for PPO: {measured}"


def _is_higher(difference: Array) -> Array:
    """1 where a difference is positive, 1/2 where it is 0, else 0."""
    return (difference > 0) + 0.5 * (difference == 0)


def _calibration_error(difference: Array) -> float:
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gap = confidence - _is_higher(difference)
    return float(sum(abs(gap[bins == b].sum()) for b in range(10)) / len(difference))


def _correlation(a: Array, b: Array) -> float:
    spread = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread else 0.0
