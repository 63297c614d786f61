"""The held-out results of a run, as a table and in the hub's format, with their standard errors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HELD_OUT, BEFORE, ERROR = "eval_", "first_eval_", "_error"


class Result(NamedTuple):
    """A held-out metric."""

    name: str
    before: str  # training; empty if the run was not evaluated then
    after: str


def of(metrics: Mapping[str, float | None]) -> list[Result]:
    """The held-out metrics of a manifest, without the errors, which are part of the values."""
    names = [name.removeprefix(HELD_OUT) for name in metrics if name.startswith(HELD_OUT) and not name.endswith(ERROR)]
    return [Result(name, *(_value(metrics, f"{prefix}{name}") for prefix in (BEFORE, HELD_OUT))) for name in names]


def table(metrics: Mapping[str, float | None]) -> str:
    """The metrics in Markdown."""
    rows = of(metrics)
    lines = ["| held out | before training | after training |", "|---|---|---|"]
    lines += [f"| {row.name.replace('_', ' ')} | {row.before} | {row.after} |" for row in rows]
    held_out = "\n".join(lines) if rows else "No rows were held out."
    errors = "\n\n± is the standard error." if any("±" in row.after for row in rows) else ""
    loss = metrics.get("train_loss")
    return held_out + errors + (f"\n\nMean training loss: {loss:.4g}." if loss is not None else "")


def of_hub(record: Mapping[str, Any], task: str) -> list[EvalResult]:
    """The metrics after training, in the format of the hub's ``model-index``."""
    from huggingface_hub import EvalResult

    data = record["data"]
    source = record["config"]["stages"][record["stage"]]["data"].get("eval_path") or data["source"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=_identifier(source),
            dataset_name=f"{data['eval_rows']} held-out rows of {source}",
            metric_type=result.name,
            metric_name=result.name.replace("_", " "),
            metric_value=result.after if "±" in result.after else float(result.after),
        )
        for result in of(record["metrics"])
        if result.after != "not finite"
    ]


def _value(metrics: Mapping[str, float | None], name: str) -> str:
    """``0.523 ± 0.031``: as many digits as the two first of the error have."""
    if name not in metrics:
        return ""
    value, error = metrics[name], metrics.get(f"{name}{ERROR}")
    if value is None or not math.isfinite(value):
        return "not finite"
    if not error or not math.isfinite(error):
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _identifier(source: str) -> str:
    """The id of a dataset on the hub, or a name that the hub accepts as one."""
    if re.fullmatch(r"[\w-]+/[\w.-]+", source) and not Path(source).exists():
        return source
    return re.sub(r"[^\w.-]+", "-", ", ".join(Path(path).name for path in source.split(", "))).strip("-")
