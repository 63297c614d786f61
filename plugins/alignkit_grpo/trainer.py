"""GRPO: advantages, weights of tokens, and the KL penalty. The rest of an iteration is in ``alignkit.online``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from alignkit import LossOutput, PolicyBatch
from alignkit.online import Advantages, OnlineTrainer, Rollouts, kl_penalty
from alignkit_grpo.advantages import relative_scores, token_weights, without_spread
from alignkit_grpo.kl import kl_estimate

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit_grpo.config import GRPOConfig


class GRPOTrainer(OnlineTrainer):
    """Advantages within groups; the presets differ in settings alone."""

    config: GRPOConfig

    def to_redraw(self, scores: Tensor, kept: Tensor, attempt: int) -> Tensor:
        """The groups without spread, ``redraws`` times."""
        if attempt > self.config.redraws:
            return torch.zeros_like(kept)
        size = self.config.samples_per_prompt
        return without_spread(scores, kept, size).repeat_interleave(size)

    def estimate_advantages(self, rollouts: Rollouts) -> Advantages:
        """Each token has its answer's relative score; with ``kl=reward``, less the KL penalty from it to the end."""
        config, size, mask = self.config, self.config.samples_per_prompt, rollouts.mask
        penalty = kl_penalty(rollouts.logps, rollouts.ref_logps, mask, self.kl_coef)
        scores = rollouts.scores + penalty.sum(1) if config.kl == "score" else rollouts.scores
        relative = relative_scores(scores, rollouts.kept, size, config.advantage)
        if config.advantage == "batch":
            relative = self.statistics.whiten(relative, rollouts.kept)
        advantages = relative[:, None] * mask
        if config.kl == "reward":
            advantages = advantages + penalty.flip(1).cumsum(1).flip(1) * mask
        equal = without_spread(rollouts.scores, rollouts.kept, size)
        share = self.statistics.mean(equal.float())
        self.signs.warn("equal", share == 1, "in every group, all answers have the same score, so nothing is learned")
        return Advantages(advantages, metrics={"equal_scores": share})

    def get_batch_samples(self, *args: Any) -> Any:
        """The microbatches of a step, with the weight of each token in the loss.

        Advantages carry it too, relative to the mean over tokens that losses are: the loss of a token is proportional
        to its advantage.
        """
        batches, num_tokens = super().get_batch_samples(*args)
        if not batches:  # the rollout engine is unavailable
            return batches, num_tokens
        answers = sum(batch["mask"].any(1).sum() for batch in batches)
        of_step = num_tokens, self.accelerator.reduce(answers).clamp(min=1), self.config.response_length
        for batch in batches:
            batch["weights"] = token_weights(batch["mask"], self.config.aggregate, *of_step)
            batch["advantages"] = batch["advantages"] * batch["weights"] * num_tokens
        return batches, num_tokens

    def loss_of(self, batch: PolicyBatch, inputs: Mapping[str, Any]) -> LossOutput:
        """The loss of the component, and with ``kl=loss`` the KL penalty."""
        output = super().loss_of(batch, inputs)
        if self.config.kl != "loss":
            return output
        kl = kl_estimate(self.config.kl_estimator, batch.logps, batch.old_logps, inputs["ref_logps"])
        kl_loss = self.metrics["kl_coef"] * (kl * inputs["weights"]).sum()  # self.kl_coef is the next iteration's
        return LossOutput(output.loss + kl_loss, {**output.metrics, "kl_loss": kl_loss.detach()})
