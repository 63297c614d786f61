"""Functions of :class:`alignkit.Answers` that return one score per answer."""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from alignkit import Answers, RewardFunction, Run
from alignkit.generation import build_reward, import_scorer

if TYPE_CHECKING:
    from torch import nn

    from alignkit_rewards.config import EnsembleConfig, FunctionConfig, SumConfig


def function(config: FunctionConfig) -> Callable[[Answers], Sequence[float]]:
    """Call ``module:function``."""
    return import_scorer(str(config.call))


def ensemble(config: EnsembleConfig, run: Run) -> RewardFunction:
    """Combine the scores of several reward models."""
    members = [run.reward_run(path) for path in config.paths]
    combine = functools.partial(COMBINE[config.by], config=config)

    def score(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        scores = [member(answers, roles) for member in members]
        return [combine(of_answer) for of_answer in zip(*scores, strict=True)]

    return score


# "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743): mean, worst case, and a bound that is
# lower if the members disagree. The paper subtracts their variance; the standard deviation has the unit of the scores.
COMBINE: dict[str, Callable[..., float]] = {
    "mean": lambda scores, config: statistics.fmean(scores),
    "min": lambda scores, config: min(scores),
    "mean-std": lambda scores, config: statistics.fmean(scores) - config.std_coef * statistics.pstdev(scores),
}


def weighted_sum(config: SumConfig, run: Run) -> RewardFunction:
    """The weighted sum of the parts' scores. Errors in a part carry the part's own name."""
    weights = [float(table.get("weight", 1.0)) for table in config.parts]
    parts = [build_reward(run, table, own=("weight",)) for table in config.parts]

    def score(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        scores = [part(answers, roles) for part in parts]
        return [sum(map(operator.mul, weights, of_answer)) for of_answer in zip(*scores, strict=True)]

    return score
