"""Metrics of a reward model, from the scores of held-out rankings. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkit.evaluation import error_bar
from alignkit_rm.pairs import Pairs, calibration_error, is_higher, pairs_of

Array = NDArray[Any]


def evaluate(
    scores: Array, ranks: Array, lengths: Array, scale: float = 1.0, prompts: Sequence[int] | None = None
) -> dict[str, float]:
    """Metrics of groups, which are given as to :func:`alignkit_rm.pairs.pairs_of`.

    - ``accuracy``: the pairwise accuracy, which is the share of pairs (without ties) whose better answer has the higher
      score; ``accuracy_distance_1``, ``_2``, ``_3plus``: that of pairs by distance in rank. ``..._error`` is the
      standard error of each over prompts, because the pairs of a prompt are not independent
    - ``ece``: the expected calibration error in ten bins: how far sigmoid(score difference * ``scale``) is from the
      accuracy
    - ``length_correlation``: Pearson's correlation of score and answer length within a prompt; ``length_accuracy``: the
      accuracy of "longer is better" or "shorter is better", whichever is higher
    - ``score_mean`` and ``score_std``: over answers
    """
    pairs = pairs_of(scores, ranks, lengths, scale, prompts)
    length_accuracy = is_higher(pairs.length_difference).mean()
    answers = ranks >= 0
    groups = zip(scores, lengths, answers, strict=True)
    centered = np.concatenate([_centered(np.stack([score[of], length[of]])) for score, length, of in groups], axis=1)
    metrics = {
        **_accuracy("accuracy", pairs),
        "pairs": float(len(pairs.difference)),
        "ece": calibration_error(pairs),
        "length_correlation": _correlation(*centered),
        "length_accuracy": float(max(length_accuracy, 1 - length_accuracy)),
        "score_mean": float(scores[answers].mean()),
        "score_std": float(scores[answers].std()),
    }
    distance = pairs.distance
    for name, chosen in (("1", distance == 1), ("2", distance == 2), ("3plus", distance >= 3)):
        if chosen.any():
            metrics |= _accuracy(f"accuracy_distance_{name}", pairs.where(chosen))
    return metrics


def _accuracy(name: str, pairs: Pairs) -> dict[str, float]:
    return {name: float(pairs.correct.mean()), **error_bar(f"{name}_error", pairs.correct, pairs.prompt)}


def _centered(values: Array) -> Array:
    return values - values.mean(axis=1, keepdims=True)


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


def _correlation(a: Array, b: Array) -> float:
    spread = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread else 0.0
