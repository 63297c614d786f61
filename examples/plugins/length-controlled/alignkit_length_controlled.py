"""A reward around another one that takes off what mere length explains of its scores.

Reward models like long answers, and a policy learns that first. On each batch a line is fitted to the scores over the
answers' lengths, and what it says of each length is subtracted. Its slope is fitted anew on each batch, so nothing has
to be kept between them and a resumed run goes on exactly.
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
    """Scores less the fitted effect of length, with the same mean; ``lengths`` are in tokens."""
    sizes = [math.log(n) if config.scale == "log" else float(n) for n in lengths]
    if len(scores) < config.fewest or len(set(sizes)) == 1:
        return list(scores)
    slope, _ = statistics.linear_regression(sizes, scores)
    middle = statistics.fmean(sizes)
    return [score - config.strength * slope * (n - middle) for score, n in zip(scores, sizes, strict=True)]


def build(config: LengthConfig, run: Run) -> RewardFunction:
    """The function of answers.

    Raises:
        ConfigError: ``of`` names no reward.
        PluginError: no active plugin gives that reward.
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
