"""The loss of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

from alignkit import LossOutput, NoConfig, TokenLogps


def build(config: NoConfig) -> Callable[[TokenLogps], LossOutput]:
    """The function: it has nothing to configure."""
    return nll


def nll(batch: TokenLogps) -> LossOutput:
    """Mean negative log-likelihood of the target tokens of a whole optimizer step.

    ``-sum(logps) / num_tokens``: however a step is cut into microbatches, their losses add up to the same.
    """
    return LossOutput(-(batch.logps * batch.mask).sum() / batch.num_tokens)
