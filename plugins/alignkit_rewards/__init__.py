"""Rewards: a reward model of one's own, any classifier of the hub, a Python function."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from alignkit import ConfigError, Reward, hookimpl, option
from alignkit.generation import rankings


@dataclass(frozen=True)
class ModelConfig:
    """The ``reward`` table of ``reward-model``."""

    path: str | None = option(None, "a run folder of stage rm; null: found, or trained first")


@dataclass(frozen=True)
class ClassifierConfig:
    """The ``reward`` table of ``classifier``."""

    model: str | None = option(None, "a sequence-classification model or its PEFT adapter: a hub id or a folder")
    label: int | str | None = option(None, "the label whose logit is the score, by name or index; null: the only one")
    batch: int = option(16, "answers at a time")


@dataclass(frozen=True)
class FunctionConfig:
    """The ``reward`` table of ``function``."""

    call: str | None = option(None, "module:function, of two lists, prompts and answers, to a score each")


@dataclass(frozen=True)
class EnsembleConfig:
    """The ``reward`` table of ``ensemble``."""

    paths: list[str] = option([], "run folders of stage rm, two or more")
    by: Literal["mean", "min", "mean-std"] = option("mean", "how an answer's scores become one")
    std_coef: Annotated[float, Ge(0)] = option(1.0, "how many standard deviations mean-std subtracts")


@dataclass(frozen=True)
class SumConfig:
    """The ``reward`` table of ``sum``."""

    parts: list[dict[str, Any]] = option([], "rewards, each with its name, its weight (1 if unset) and its own keys")
    path: str | None = option(None, "the run folder of each reward-model part that has no path of its own")


def check_classifier(config: ClassifierConfig) -> None:
    from alignkit_rewards.classify import check

    check(config)


def check_function(config: FunctionConfig) -> None:
    if config.call is None:
        raise ConfigError("reward 'function' needs reward.call=module:function")
    rankings.function(config.call)


def check_ensemble(config: EnsembleConfig) -> None:
    if len(set(config.paths)) < 2 or len(set(config.paths)) < len(config.paths):
        raise ConfigError("reward 'ensemble' needs reward.paths: two or more different run folders of stage rm")
    if config.std_coef != 1.0 and config.by != "mean-std":
        raise ConfigError("reward.std_coef does nothing without reward.by=mean-std")


def check_sum(config: SumConfig) -> None:
    if not config.parts:
        raise ConfigError("reward 'sum' needs reward.parts: a list of tables with name and weight")
    for number, part in enumerate(config.parts):
        weight = part.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"reward.parts[{number}].weight must be a number, not {weight!r}")


def weighted_sum(config: SumConfig, run: Any) -> Any:
    from alignkit_rewards.build import weighted_sum

    return weighted_sum(config, run)


def ensemble(config: EnsembleConfig, run: Any) -> Any:
    from alignkit_rewards.build import ensemble

    return ensemble(config, run)


def rm(config: ModelConfig, run: Any) -> Any:
    return run.reward_run(config.path)


def classifier(config: ClassifierConfig, run: Any) -> Any:
    from alignkit_rewards.classify import build

    return build(config, run)


def function(config: FunctionConfig, run: Any) -> Any:
    from alignkit_rewards.build import function

    return function(config)


@hookimpl
def alignkit_reward() -> list[Reward]:
    return [
        Reward(
            name="reward-model",
            summary="a reward model that alignkit trained, on the policy's trunk where it can be",
            config=ModelConfig,
            build=rm,
            needs=lambda config: {"reward": "rm"},
        ),
        Reward(
            name="classifier",
            summary="any sequence-classification model, with its own tokenizer and template",
            config=ClassifierConfig,
            check=check_classifier,
            build=classifier,
        ),
        Reward(
            name="function",
            summary="a Python function of prompts and answers",
            config=FunctionConfig,
            check=check_function,
            build=function,
        ),
        Reward(
            name="ensemble",
            summary="several reward models: their mean, their minimum, or the mean less the deviation",
            config=EnsembleConfig,
            check=check_ensemble,
            build=ensemble,
            needs=lambda config: {"reward": "rm"},
        ),
        Reward(
            name="sum",
            summary="several rewards, each with a weight",
            config=SumConfig,
            check=check_sum,
            build=weighted_sum,
            parts="parts",
            part_keys=("weight",),
        ),
    ]
