"""Rewards: a reward model from stage rm, any classifier, a Python function, and combinations of rewards."""

from typing import Any

from alignkit import NoConfig, Reward, Run, hookimpl
from alignkit_rewards.config import (
    ClassifierConfig,
    EnsembleConfig,
    FunctionConfig,
    ModelConfig,
    SumConfig,
    check_ensemble,
    check_function,
    check_sum,
)


def check_classifier(config: ClassifierConfig) -> None:
    from alignkit_rewards.classify import check

    check(config)


def weighted_sum(config: SumConfig, run: Run) -> Any:
    from alignkit_rewards.build import weighted_sum

    return weighted_sum(config, run)


def ensemble(config: EnsembleConfig, run: Run) -> Any:
    from alignkit_rewards.build import ensemble

    return ensemble(config, run)


def rm(config: ModelConfig, run: Run) -> Any:
    return run.reward_run(config.path)


def classifier(config: ClassifierConfig, run: Run) -> Any:
    from alignkit_rewards.classify import build

    return build(config, run)


def function(config: FunctionConfig, run: Run) -> Any:
    from alignkit_rewards.build import function

    return function(config)


def exact(config: NoConfig, run: Run) -> Any:
    from alignkit_rewards.exact_answer import score

    return score


@hookimpl
def alignkit_reward() -> list[Reward]:
    return [
        Reward(
            name="reward-model",
            summary="a reward model trained by alignkit, on the policy's base if possible",
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
            name="exact-answer",
            summary="1 if the final number or boxed expression is the row's answer, else 0",
            build=exact,
            fields=("answer",),
        ),
        Reward(
            name="ensemble",
            summary="several reward models: mean, minimum, or mean minus standard deviation",
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
