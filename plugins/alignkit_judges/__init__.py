"""Judges: functions that rank answers to the same prompt."""

from typing import Any

from alignkit import Judge, Plan, Reward, Run, hookimpl
from alignkit_judges import openai_judge
from alignkit_judges.config import (
    FunctionConfig,
    LocalConfig,
    ModelConfig,
    OpenAIConfig,
    RewardConfig,
    check_function,
    check_local,
    identity_of_local,
)


def build_local(config: LocalConfig, run: Run) -> Any:
    from alignkit_judges.local import build

    return build(config, run)


def function(config: FunctionConfig, run: Run) -> Any:
    from alignkit_judges.scores import function

    return function(config)


def reward_model(config: ModelConfig, run: Run) -> Any:
    from alignkit_judges.scores import reward_model

    return reward_model(config, run)


def check_reward(config: RewardConfig, plan: Plan | None) -> None:
    from alignkit_judges.reward import check

    check(config, plan)


def win_rate(config: RewardConfig, run: Run) -> Any:
    from alignkit_judges.reward import win_rate

    return win_rate(config, run)


@hookimpl
def alignkit_judge() -> list[Judge]:
    return [
        Judge(
            name="openai",
            summary="a language model on a server that speaks /v1/chat/completions: vLLM, Ollama, llama.cpp, OpenAI",
            config=OpenAIConfig,
            requires=("openai",),
            check=openai_judge.check,
            build=openai_judge.build,
            largest=lambda config: config.largest,
            identity=openai_judge.identity,
            tokens=openai_judge.tokens,
        ),
        Judge(
            name="local",
            summary="a language model on this machine: its probabilities of the answers A and B",
            config=LocalConfig,
            check=check_local,
            build=build_local,
            graded=True,
            identity=identity_of_local,
        ),
        Judge(
            name="function",
            summary="a Python function that scores answers",
            config=FunctionConfig,
            check=check_function,
            build=function,
            largest=lambda config: None,
            order_matters=False,
            identity=lambda config: None,
        ),
        Judge(
            name="reward-model",
            summary="a reward model trained by alignkit",
            config=ModelConfig,
            build=reward_model,
            largest=lambda config: None,
            order_matters=False,
            needs=lambda config: {"reward": "rm"},
            identity=lambda config: None,
        ),
    ]


@hookimpl
def alignkit_reward() -> list[Reward]:
    return [
        Reward(
            name="judge",
            summary="the share of comparisons that an answer wins, by a judge",
            config=RewardConfig,
            check=check_reward,
            build=win_rate,
            judge="judge",
        )
    ]
