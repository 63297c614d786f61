"""PPO: advantages from a learned value function. The rest of an iteration is in ``alignkit.online``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit import Run
from alignkit.online import Advantages, OnlineTrainer, Rollouts, build_trainer, kl_penalty
from alignkit_ppo.gae import gae, token_rewards

if TYPE_CHECKING:
    from alignkit_ppo.config import PPOConfig


def build(run: Run) -> PPOTrainer:
    """The trainer."""
    config: PPOConfig = run.config.stage.config
    run.policy_learns_from = config.value_warmup * config.steps
    return build_trainer(run, PPOTrainer)


class PPOTrainer(OnlineTrainer):
    """Steps 4 to 6 of PPO."""

    config: PPOConfig

    def on_first_scores(self, mean: float) -> None:
        """Let the new value function predict the mean score, unless rewards are on a scale of their own."""
        if not self.config.whiten_rewards:
            self.roles.start_value(mean)

    @property
    def trains_policy(self) -> bool:
        """False in the first ``value_warmup`` iterations."""
        return self.iteration >= self.config.value_warmup

    def estimate_advantages(self, rollouts: Rollouts) -> Advantages:
        """Rewards per token, GAE, whitening."""
        assert rollouts.values is not None  # PPO always has a value function
        config, mask, values = self.config, rollouts.mask, rollouts.values
        penalty = kl_penalty(rollouts.logps, rollouts.ref_logps, rollouts.answer_mask, self.kl_coef)
        rewards = token_rewards(rollouts.scores, penalty, rollouts.answer_mask)  # 4
        if config.whiten_rewards:
            rewards = self.statistics.whiten(rewards, mask, shift=False)
        advantages, returns = gae(rewards, values, rollouts.answer_mask, config.gamma, config.lam)  # 5
        metrics = {"explained_variance": self.statistics.explained_variance(values, returns, mask)}
        return Advantages(self.statistics.whiten(advantages, mask), returns, metrics)  # 6
