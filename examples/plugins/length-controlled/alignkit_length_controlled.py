"""A reward that wraps another one and removes the effect of length from its scores.

Reward models tend to prefer long answers, and a policy learns that first. For each batch, a line is fitted to the
scores over the lengths of the answers, and its slope times the length is subtracted. There is no state between batches,
so a resumed run continues exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from alignkit import Answers, Reward, RewardFunction, Run, hookimpl, option
from alignkit.generation import build_reward

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LengthConfig:
    """The ``reward`` table of ``length-controlled``."""

    of: dict[str, Any] = option({"name": "reward-model"}, "the inner reward: its name and its own settings")
    path: str | None = option(
        None, "the run folder of an inner reward model; null: the newest matching run, or train one first"
    )
    strength: Annotated[float, Ge(0), Le(1)] = option(1.0, "the share of the length effect that is removed")
    scale: Literal["linear", "log"] = option("log", "fit the scores to the length in tokens, or to its logarithm")
    fewest: Annotated[int, Ge(3)] = option(16, "minimum batch size; smaller batches are not corrected")


def without_length(scores: Sequence[float], lengths: Sequence[int], config: LengthConfig) -> list[float]:
    """The scores minus the fitted effect of length, with the same mean; ``lengths`` are in tokens."""
    sizes = [math.log(n) if config.scale == "log" else float(n) for n in lengths]
    if len(scores) < config.fewest or len(set(sizes)) == 1:
        return list(scores)
    slope, _ = statistics.linear_regression(sizes, scores)
    middle = statistics.fmean(sizes)
    return [score - config.strength * slope * (n - middle) for score, n in zip(scores, sizes, strict=True)]


def build(config: LengthConfig, run: Run) -> RewardFunction:
    """Return the function that scores answers.

    Raises:
        ConfigError: ``of`` names no reward.
        PluginError: no active plugin has that reward.
    """
    inner = build_reward(run, config.of)

    def score(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        return without_length(inner(answers, roles), [len(ids) for ids in answers.answer_ids], config)

    return score


@hookimpl
def alignkit_reward() -> list[Reward]:
    return [
        Reward(
            name="length-controlled",
            summary="another reward with the effect of length removed",
            config=LengthConfig,
            build=build,
            parts="of",
        )
    ]
