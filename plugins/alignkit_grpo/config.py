"""The ``grpo`` table, and those of its presets, which have other defaults."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from alignkit import option
from alignkit.online import OnlineConfig

Advantage = Literal["group", "group-mean", "leave-one-out", "batch"]
Aggregate = Literal["token", "sequence", "constant"]
KL = Literal["reward", "score", "loss"]

ADVANTAGE = "how the score of an answer is compared with those of the other answers to its prompt"
AGGREGATE = "token: mean over tokens; sequence: mean of the answers' means; constant: mean of sums / response_length"
KL_IN = (
    "reward: a penalty per token, added to advantages after scores are compared; score: the KL of the "
    "whole answer, subtracted from its score before it is compared; loss: a term of the loss"
)


@dataclass(frozen=True)
class GRPOConfig(OnlineConfig):
    """GRPO's settings in addition to :class:`OnlineConfig`."""

    samples_per_prompt: Annotated[int, Ge(2)] = option(8, "answers per prompt, which are compared with each other")
    advantage: Advantage = option("group", ADVANTAGE)
    aggregate: Aggregate = option("token", AGGREGATE)
    kl: KL = option("reward", KL_IN)
    kl_estimator: Literal["k1", "k2", "k3", "k3-plain"] = option(
        "k3", "how the loss estimates the KL", only_with="kl=loss"
    )
    redraws: Annotated[int, Ge(0), Le(4)] = option(
        0,
        "maximum times per iteration that groups whose answers all score the same are replaced by groups of other "
        "prompts (dynamic sampling); 0: never",
    )


@dataclass(frozen=True)
class DrGRPOConfig(GRPOConfig):
    """Dr. GRPO (arXiv 2503.20783)."""

    advantage: Advantage = option("group-mean", ADVANTAGE)
    aggregate: Aggregate = option("constant", AGGREGATE)


@dataclass(frozen=True)
class RLOOConfig(GRPOConfig):
    """RLOO (arXiv 2402.14740): REINFORCE on whole answers, so one step per batch."""

    advantage: Advantage = option("leave-one-out", ADVANTAGE)
    aggregate: Aggregate = option("constant", AGGREGATE)
    kl: KL = option("score", KL_IN)
    minibatches: Annotated[int, Gt(0)] = option(1, "optimizer steps per epoch; reinforce is exact for the first one")
