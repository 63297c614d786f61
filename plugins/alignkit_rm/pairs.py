"""Pairs of answers in held-out rankings: accuracy by distance in rank, and calibration. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignkit.evaluation import error_bar
from alignkit.runs import write_json

Array = NDArray[Any]
FILE = "pairs.json"  # in the run folder
BINS = 10  # of the predicted probability, from 1/2 to 1


class Pairs(NamedTuple):
    """All pairs of answers to the same prompt that differ in rank, [P]."""

    difference: Array  # the score of the better answer minus that of the worse, on the scale of the loss
    distance: Array  # in rank: 1 if no answer to the prompt has a rank between those of the two
    length_difference: Array  # the length of the better answer minus that of the worse
    prompt: Array  # the index of the prompt

    def where(self, chosen: Array) -> Pairs:
        """The pairs for which ``chosen`` [P] is true."""
        return Pairs(*(values[chosen] for values in self))

    @property
    def correct(self) -> Array:
        """1 if the better answer has the higher score, 1/2 if the scores are equal, else 0."""
        return is_higher(self.difference)


def pairs_of(
    scores: Array, ranks: Array, lengths: Array, scale: float = 1.0, prompts: Sequence[int] | None = None
) -> Pairs:
    """The pairs of groups: ``scores``, ``ranks`` and ``lengths`` [G, K]; a negative rank is padding.

    ``prompts`` [G] are the indices of the groups' prompts, if groups share prompts. Losses were computed on the scores
    times ``scale``.
    """
    prompts = range(len(scores)) if prompts is None else prompts
    parts = []
    for prompt, score, rank, length in zip(prompts, scores.astype(float) * scale, ranks, lengths, strict=True):
        answers = np.nonzero(rank >= 0)[0]
        place = np.unique(rank[answers], return_inverse=True)[1]
        better, worse = np.nonzero(place[:, None] < place[None, :])
        b, w = answers[better], answers[worse]
        of_prompt = np.full(len(b), prompt)
        parts.append((score[b] - score[w], place[worse] - place[better], length[b] - length[w], of_prompt))
    return Pairs(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def is_higher(difference: Array) -> Array:
    """1 where a difference is positive, 1/2 where it is 0, else 0."""
    return (difference > 0) + 0.5 * (difference == 0)


def by_distance(pairs: Pairs) -> list[dict[str, Any]]:
    """The accuracy of the pairs of each distance in rank. The error is None if they have only one prompt."""
    rows = []
    for distance in np.unique(pairs.distance):
        chosen = pairs.where(pairs.distance == distance)
        row = {"distance": int(distance), "pairs": len(chosen.correct), "accuracy": float(chosen.correct.mean())}
        rows.append({**row, "error": _error(chosen)})
    return rows


def _error(pairs: Pairs) -> float | None:
    return error_bar("error", pairs.correct, pairs.prompt).get("error")


def calibration(pairs: Pairs) -> list[dict[str, Any]]:
    """The observed and the predicted accuracy of scores on pairs, by bins of the predicted one.

    ``predicted`` is the mean of sigmoid(higher score - lower score) over the pairs of a bin, a probability between 1/2
    and 1; ``observed`` is the share of them that the ranking orders in the same way. Bins without pairs are left out.
    The error is that of ``observed``, over prompts; None if the bin has only one prompt.
    """
    confidence = 1 / (1 + np.exp(-np.abs(pairs.difference)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    rows = []
    for number in np.unique(bins):
        chosen = pairs.where(bins == number)
        row = {"predicted": float(confidence[bins == number].mean()), "observed": float(chosen.correct.mean())}
        rows.append({**row, "error": _error(chosen), "pairs": len(chosen.correct)})
    return rows


def calibration_error(pairs: Pairs) -> float:
    """The expected calibration error: the mean over pairs of the gap of ``observed`` to ``predicted`` in their bin."""
    gaps = [row["pairs"] * abs(row["predicted"] - row["observed"]) for row in calibration(pairs)]
    return float(sum(gaps) / len(pairs.difference))


def write(folder: Path, step: int, pairs: Pairs) -> None:
    """Write ``pairs.json`` into a run folder: accuracy by distance, and calibration, at an evaluation."""
    content = {"step": step, "by_distance": by_distance(pairs), "calibration": calibration(pairs)}
    write_json(folder / FILE, content)
