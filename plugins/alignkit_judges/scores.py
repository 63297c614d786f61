"""Judges that score each answer by itself."""

from __future__ import annotations

from typing import Any

from alignkit import Run
from alignkit.generation import import_scorer
from alignkit.judging import by_scores
from alignkit_judges.config import FunctionConfig, ModelConfig


def function(config: FunctionConfig) -> Any:
    """Rank by the scores of ``module:function``."""
    return by_scores(import_scorer(str(config.call)), str(config.call))


def reward_model(config: ModelConfig, run: Run) -> Any:
    """Rank by the scores of a reward model."""
    return by_scores(run.reward_run(config.path))
