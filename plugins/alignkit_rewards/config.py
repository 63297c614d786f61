"""The settings of the rewards, and their checks."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from alignkit import ConfigError, option
from alignkit.generation import import_scorer


@dataclass(frozen=True)
class ModelConfig:
    """The ``reward`` table of ``reward-model``."""

    path: str | None = option(None, "a run folder of stage rm; null: the newest matching run, or train one first")


@dataclass(frozen=True)
class ClassifierConfig:
    """The ``reward`` table of ``classifier``."""

    model: str | None = option(None, "a sequence-classification model or a PEFT adapter of one: a hub id or a folder")
    label: int | str | None = option(None, "the label whose logit is the score, by name or index; null: the only label")
    batch: int = option(16, "answers per forward pass")


@dataclass(frozen=True)
class FunctionConfig:
    """The ``reward`` table of ``function``."""

    call: str | None = option(
        None,
        "module:function; takes lists of prompts (last user turns) and answers; returns scores",
        needs_trust="runs this code",
    )


@dataclass(frozen=True)
class EnsembleConfig:
    """The ``reward`` table of ``ensemble``."""

    paths: list[str] = option([], "two or more run folders of stage rm")
    by: Literal["mean", "min", "mean-std"] = option("mean", "how the scores of an answer are combined")
    std_coef: Annotated[float, Ge(0)] = option(
        1.0, "the number of standard deviations that mean-std subtracts", only_with="by=mean-std"
    )


@dataclass(frozen=True)
class SumConfig:
    """The ``reward`` table of ``sum``."""

    parts: list[dict[str, Any]] = option([], "rewards, each with its name, its weight (1 if unset) and its own keys")
    path: str | None = option(None, "the run folder of reward-model parts without a path of their own")


def check_function(config: FunctionConfig) -> None:
    if config.call is None:
        raise ConfigError("reward 'function' needs reward.call=module:function")
    import_scorer(config.call)


def check_ensemble(config: EnsembleConfig) -> None:
    if len(set(config.paths)) < 2 or len(set(config.paths)) < len(config.paths):
        raise ConfigError("reward 'ensemble' needs reward.paths: two or more different run folders of stage rm")


def check_sum(config: SumConfig) -> None:
    if not config.parts:
        raise ConfigError("reward 'sum' needs reward.parts: a list of tables with name and weight")
    for number, part in enumerate(config.parts):
        weight = part.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"reward.parts[{number}].weight must be a number, not {weight!r}")
