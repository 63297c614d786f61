"""Rewards: a reward model of one's own, any classifier of the hub, a Python function."""

from dataclasses import dataclass
from typing import Any

from alignkit import ConfigError, Reward, hookimpl, option, rankings


@dataclass(frozen=True)
class ModelConfig:
    """The ``reward`` table of ``reward-model``."""

    path: str | None = option(None, "a run folder of stage rm; null: found, or trained first")


@dataclass(frozen=True)
class ClassifierConfig:
    """The ``reward`` table of ``classifier``."""

    model: str | None = option(None, "a sequence-classification model: a hub id or a folder")
    label: int = option(0, "the label whose logit is the score")
    batch: int = option(16, "answers at a time")


@dataclass(frozen=True)
class FunctionConfig:
    """The ``reward`` table of ``function``."""

    call: str | None = option(None, "module:function, of two lists, prompts and answers, to a score each")


@dataclass(frozen=True)
class SumConfig:
    """The ``reward`` table of ``sum``."""

    parts: list[dict[str, Any]] = option([], "rewards, each with its name, its weight and its own keys")
    path: str | None = option(None, "the run folder of a reward-model among them; null: found, or trained first")


def check_classifier(config: ClassifierConfig) -> None:
    if config.model is None:
        raise ConfigError("reward 'classifier' needs reward.model: a sequence-classification model")


def check_function(config: FunctionConfig) -> None:
    if config.call is None:
        raise ConfigError("reward 'function' needs reward.call=module:function")
    rankings.function(config.call)


def check_sum(config: SumConfig) -> None:
    if not config.parts:
        raise ConfigError("reward 'sum' needs reward.parts: a list of tables with name and weight")
    if not all("name" in part for part in config.parts):
        raise ConfigError("reward.parts: a part has no name")


def sum_needs(config: SumConfig) -> dict[str, str]:
    """A reward model's run, where one is among the parts."""
    return {"reward": "rm"} if any(part.get("name") == "reward-model" for part in config.parts) else {}


def weighted_sum(config: SumConfig, run: Any) -> Any:
    from alignkit_rewards.build import weighted_sum

    return weighted_sum(config, run)


def rm(config: ModelConfig, run: Any) -> Any:
    from alignkit_rewards.build import rm

    return rm(run)


def classifier(config: ClassifierConfig, run: Any) -> Any:
    from alignkit_rewards.build import classifier

    return classifier(config, run)


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
            name="sum",
            summary="several rewards, each with a weight",
            config=SumConfig,
            check=check_sum,
            build=weighted_sum,
            needs=sum_needs,
        ),
    ]
