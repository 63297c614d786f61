"""The metrics of lm-eval's tasks, with standard errors: those of the difference of two runs are paired by document."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from alignkit.evaluation.error_bars import jackknife, standard_error


class Documents(NamedTuple):
    """The values of a metric for the documents of a task, before they are aggregated."""

    weight: float  # of the task in a group; 1 for a task on its own
    values: dict[int, Any]  # document -> value
    aggregate: Callable[[list[Any]], float]


class TaskMetric(NamedTuple):
    """A metric of a task or a group of tasks."""

    task: str
    metric: str
    filter: str  # how lm-eval extracts the answer from a text; "none" if it does not
    value: float
    higher_is_better: bool | None
    num_fewshot: int | None
    version: Any
    parts: list[Documents]  # of a group: one per task


def of_results(tasks: Any, results: Mapping[str, Any]) -> list[TaskMetric]:
    """The metrics in what ``lm_eval.evaluate`` returns, of groups and of tasks."""
    return [*_of_groups(tasks, results), *_of_tasks(tasks, results)]


def _of_groups(tasks: Any, results: Mapping[str, Any]) -> Iterator[TaskMetric]:
    for name, group in tasks["groups"].items():
        for metric, filter_name, value in _values(results.get("groups", {}).get(name, {})):
            parts = _parts(group, metric, filter_name, tasks, results)
            yield _task_metric(results, name, metric, filter_name, value, parts)


def _of_tasks(tasks: Any, results: Mapping[str, Any]) -> Iterator[TaskMetric]:
    for name, task in tasks["tasks"].items():
        for metric, filter_name, value in _values(results["results"][name]):
            part = _documents(1.0, task, results["samples"][name], metric, filter_name)
            yield _task_metric(results, name, metric, filter_name, value, [part])


def _values(of_task: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """The metrics in lm-eval's results: ``{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "arc"}``."""
    for key, value in of_task.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            yield metric, filter_name, float(value)


def _task_metric(
    results: Mapping[str, Any], name: str, metric: str, filter_name: str, value: float, parts: list[Documents]
) -> TaskMetric:
    higher = results["higher_is_better"].get(name, {}).get(metric)
    shots, version = results["n-shot"].get(name), results["versions"].get(name)
    return TaskMetric(name, metric, filter_name, value, higher, shots, version, parts)


def _documents(
    weight: float, task: Any, samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str
) -> Documents:
    from lm_eval.api.metrics import mean

    of_metric = [sample for sample in samples if sample["filter"] == filter_name and metric in sample["metrics"]]
    values = {sample["doc_id"]: sample[metric] for sample in of_metric}
    return Documents(weight, values, task.aggregation().get(metric, mean))


def _parts(group: Any, metric: str, filter_name: str, tasks: Any, results: Mapping[str, Any]) -> list[Documents]:
    """The tasks of a group, with the weights of their mean."""
    by_size = next(entry.weight_by_size for entry in group.aggregate_metric_list if entry.metric == metric)
    leaves = [task.task_name for task in group.get_all_tasks()]
    leaves = [leaf for leaf in leaves if f"{metric},{filter_name}" in results["results"][leaf]]
    sizes = [results["results"][leaf]["sample_len"] if by_size else 1 for leaf in leaves]
    return [
        _documents(size / sum(sizes), tasks["tasks"][leaf], results["samples"][leaf], metric, filter_name)
        for leaf, size in zip(leaves, sizes, strict=True)
    ]


# --- rows -----------------------------------------------------------------------------------------------------------


def rows(measured: Sequence[TaskMetric], first: Sequence[TaskMetric] | None) -> list[dict[str, Any]]:
    """A row per metric: its value, and the difference to that of the first run, with standard errors over documents."""
    others = {(each.task, each.metric, each.filter): each for each in first or []}
    result = []
    for each in measured:
        other = others.get((each.task, each.metric, each.filter))
        difference, difference_error = (None, None) if other is None else _difference(each, other)
        result.append(
            {
                "task": each.task,
                "metric": each.metric,
                "filter": each.filter,
                "value": each.value,
                "error": _combined([(part.weight, _error(part)) for part in each.parts]),
                "difference": difference,
                "difference_error": difference_error,
                "higher_is_better": each.higher_is_better,
                "documents": sum(len(part.values) for part in each.parts),
                "num_fewshot": each.num_fewshot,
                "version": each.version,
            }
        )
    return result


def _error(part: Documents) -> float | None:
    values = list(part.values.values())
    return _finite(standard_error(values)) if _is_mean(part) else jackknife(part.aggregate, values)


def _difference(own: TaskMetric, other: TaskMetric) -> tuple[float, float | None]:
    """The difference of two runs in a metric, over the documents that both have, and its paired standard error."""
    total, errors = 0.0, list[tuple[float, float | None]]()
    for part, first in zip(own.parts, other.parts, strict=True):
        pairs = [(value, first.values[number]) for number, value in part.values.items() if number in first.values]
        change = functools.partial(_change, part.aggregate)
        if _is_mean(part):
            differences = [float(a) - float(b) for a, b in pairs]
            difference, error = math.fsum(differences) / len(differences), _finite(standard_error(differences))
        else:
            difference, error = change(pairs), jackknife(change, pairs)
        total += part.weight * difference
        errors.append((part.weight, error))
    return total, _combined(errors)


def _change(aggregate: Callable[[list[Any]], float], pairs: Sequence[tuple[Any, Any]]) -> float:
    return float(aggregate([a for a, _ in pairs])) - float(aggregate([b for _, b in pairs]))


def _is_mean(part: Documents) -> bool:
    from lm_eval.api.metrics import mean

    return part.aggregate is mean


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _combined(errors: Sequence[tuple[float, float | None]]) -> float | None:
    """The standard error of a weighted sum of independent values; pairs of weight and error."""
    known = [weight * error for weight, error in errors if error is not None]
    return math.sqrt(math.fsum(error**2 for error in known)) if len(known) == len(errors) else None
