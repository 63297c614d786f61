"""The ``ppo`` table."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from alignkit import option
from alignkit.online import OnlineConfig


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """PPO's settings in addition to :class:`OnlineConfig`."""

    gamma: Annotated[float, Gt(0), Le(1)] = option(1.0, "discount factor per token")
    lam: Annotated[float, Ge(0), Le(1)] = option(0.95, "lambda of generalized advantage estimation (GAE)")
    whiten_rewards: bool = option(False, "divide rewards by their standard deviation; advantages are always whitened")
    value: Literal["adapter", "head"] = option(
        "adapter", "the value function: an adapter (or model) of its own, or a head on the policy"
    )
    value_warmup: Annotated[int, Ge(0)] = option(0, "number of initial iterations that train only the value function")

    @property
    def value_function(self) -> Literal["adapter", "head"]:
        """As ``value`` says."""
        return self.value
