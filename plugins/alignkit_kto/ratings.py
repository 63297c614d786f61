"""Ratings of answers as good or bad, and a check that KTO can learn from them. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from alignkit import ConfigError, DataError, Plan, Ranking, Rated
from alignkit_kto.config import KTOConfig, KTOLossConfig

BALANCE = 1.0, 4 / 3  # of weighted good to weighted bad answers (arXiv 2402.01306, eq. 8)
FAR = 1.5  # the plan recommends weights if the balance is off by more than this factor


def ratings(row: Rated | Ranking) -> list[tuple[int, bool]]:
    """The rated answers of a row: the index of each, and whether it is good.

    An answer of a ranking is good if it is better than more answers than are better than it, and bad in the opposite
    case. Without ties these are the best half and the worst half. Answers in the middle are left out.
    """
    if isinstance(row, Rated):
        return [(0, row.good)]
    wins = [sum(rank < other for other in row.ranks) - sum(rank > other for other in row.ranks) for rank in row.ranks]
    return [(index, won > 0) for index, won in enumerate(wins) if won]


def check(config: KTOConfig, plan: Plan | None) -> None:
    """``Stage.check``: batches of two or more answers, good and bad ones, to at least two prompts."""
    if plan is None:
        return
    if plan.config.train["per_device_train_batch_size"] < 2:
        raise ConfigError(
            "kto estimates the KL from answers to other prompts of a batch: set train.per_device_train_batch_size to 2 "
            "or more"
        )
    check_ratings(count(row for _, row in plan.train_rows), {row.key for _, row in plan.train_rows})
    if plan.eval_rows:
        check_prompts({row.key for _, row in plan.eval_rows}, "held-out")


def count(rows: Iterable[object]) -> Counter[bool]:
    """The number of good answers (True) and of bad ones (False)."""
    return Counter(good for row in rows if isinstance(row, Rated | Ranking) for _, good in ratings(row))


def check_ratings(counts: Counter[bool], prompts: set[str] | set[bytes]) -> None:
    """Check the answers to train on.

    Raises:
        DataError: there are only good or only bad ones, or all are answers to the same prompt.
    """
    if not counts:
        raise DataError("kto has no rated answer to train on: the answers of each ranking are tied")
    if len(counts) == 1:
        (good,) = counts
        kind, other = ("good", "bad") if good else ("bad", "good")
        advice = ". To imitate good answers only, use sft" if good else ""
        raise DataError(f"kto needs good and bad answers: all {counts[good]} are {kind}. Add {other} ones{advice}")
    check_prompts(prompts, "training")


def check_prompts(prompts: set[str] | set[bytes], rows: str) -> None:
    """Check that there are answers to other prompts.

    Raises:
        DataError: all answers are to the same prompt.
    """
    if len(prompts) < 2:
        where = "Add rows" if rows == "training" else "Raise data.eval_size, or set it to 0"
        raise DataError(
            f"kto estimates the KL from answers to other prompts, and all {rows} rows have the same prompt. {where}"
        )


def note(plan: Plan) -> str:
    """``Stage.note``: how many answers are good and bad, and weights if the two are far from balanced."""
    counts = count(row for _, row in plan.train_rows)
    text = f"{counts[True]} good and {counts[False]} bad answers"
    config = plan.config.loss.config
    if not isinstance(config, KTOLossConfig):
        return text
    balance = config.good_weight * counts[True] / (config.bad_weight * counts[False])
    low, high = BALANCE
    if low / FAR <= balance <= high * FAR:
        return text
    name, weight = ("good_weight", config.good_weight) if balance < low else ("bad_weight", config.bad_weight)
    ends = (weight * low / balance, weight * high / balance)
    ends = ends if balance < low else (weight * balance / high, weight * balance / low)
    return (
        f"{text}. Weighted, that is {balance:.2g} good to 1 bad; KTO recommends 1 to 1.33: set loss.{name} to a value "
        f"from {ends[0]:.3g} to {ends[1]:.3g}"
    )
