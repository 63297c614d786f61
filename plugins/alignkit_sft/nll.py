"""The loss of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

from alignkit import LossOutput, NoConfig, TokenLogps


def build(config: NoConfig) -> Callable[[TokenLogps], LossOutput]:
    """Return :func:`nll`, which has no settings."""
    return nll


def nll(batch: TokenLogps) -> LossOutput:
    """The negative log-likelihood, as a mean over the target tokens of the whole optimizer step.

    ``-sum(logps) / num_tokens``: the losses of the microbatches add up to that of the step, however it is split.
    """
    return LossOutput(-(batch.logps * batch.mask).sum() / batch.num_tokens)
