"""Metrics of KTO for a batch of rated answers."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit import LossOutput, RatedLogps
from alignkit.evaluation import error_bar
from alignkit.training import Means, loss_metrics

BY_RATING = ("rewards", "logps")  # logged for good and for bad answers


def of_answers(batch: RatedLogps, output: LossOutput, beta: float) -> dict[str, Tensor]:
    """Metrics of each answer, [B].

    ``rewards`` are implicit rewards: beta times the log-ratio to the reference, or without a reference, beta times the
    mean log-probability per token. ``reference_point`` is the estimated KL. ``accuracy`` is 1 if the log-ratio of a
    good answer is above it, or that of a bad answer below it, and 1/2 if both are equal.
    """
    with torch.no_grad():
        ratios = batch.logps / batch.length if batch.ref_logps is None else batch.logps - batch.ref_logps
        metrics = {"rewards": beta * ratios, "logps": batch.logps.detach(), **loss_metrics(output, batch.logps)}
        if batch.kl is not None:
            lead = ratios - batch.kl
            metrics["accuracy"] = ((lead > 0) == batch.good).float().where(lead != 0, 0.5)
            metrics["reference_point"] = batch.kl.expand(len(lead))
        return metrics


def add_means(means: Means, of_answers: dict[str, Tensor], good: Tensor) -> None:
    """Add the metrics of a microbatch to the means since the last log."""
    for name, values in of_answers.items():
        if name in BY_RATING:
            for rating, rated in (("good", good), ("bad", ~good)):
                means.add({f"{name}_{rating}": (values * rated).sum() / rated.sum()}, rated.sum())
        else:
            means.add({name: values.mean()}, len(good))


def margin(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    """By how much the mean reward of good answers exceeds that of bad ones; empty if there is only one kind."""
    rewards = [metrics.get(f"{prefix}rewards_{rating}") for rating in ("good", "bad")]
    return {} if None in rewards else {f"{prefix}margin": rewards[0] - rewards[1]}  # type: ignore[operator]


def of_evaluation(of_answers: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, float]:
    """Means over the answers of an evaluation, with the accuracy's standard error over prompts."""
    good = rows["good"]
    means: dict[str, float] = {}
    for name, values in of_answers.items():
        parts = {"_good": values[good], "_bad": values[~good]} if name in BY_RATING else {"": values}
        means |= {f"eval_{name}{kind}": float(part.double().mean()) for kind, part in parts.items() if len(part)}
    accuracy = of_answers.get("accuracy")
    error = {} if accuracy is None else error_bar("eval_accuracy_error", accuracy, rows["prompt_index"])
    return {**means, **margin(means, "eval_"), **error, "eval_answers": len(good)}
