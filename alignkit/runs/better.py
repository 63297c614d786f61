"""Whether a higher or a lower value of a metric is better."""

from __future__ import annotations

LOWER_IS_BETTER = ("loss", "perplexity", "ece")
HIGHER_IS_BETTER = ("score", "accuracy", "mean_token_accuracy", "reward", "margin", "win_rate")


def direction(metric: str) -> int:
    """1 if a higher value of a metric is better, -1 if a lower one is, 0 if its name does not say."""
    words = metric.split("_")
    if words[-1] in LOWER_IS_BETTER:
        return -1
    return int(metric in HIGHER_IS_BETTER or words[0] in HIGHER_IS_BETTER)
