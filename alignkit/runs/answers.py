"""``answers.jsonl`` in a run folder: the policy's answers to held-out prompts at every evaluation. Imports no torch.

A line holds one answer, with its step and its metrics. Lines are in the order of steps; step 0 is before training.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.rows import Conversation
from alignkit.runs import manifest, record

FILE = "answers.jsonl"


class Answers(NamedTuple):
    """The answers of one evaluation."""

    step: int
    prompts: list[str]  # their last turns
    answers: list[str]
    columns: dict[str, list[float | None]]  # metrics of the answers, such as ``score``; None: unknown


def write(
    folder: Path, step: int, prompts: Sequence[Conversation], answers: Sequence[str], **columns: Sequence[float]
) -> None:
    """Add the answers of the evaluation at ``step``. They replace those of the same step, and of later ones.

    ``columns`` are metrics of the answers, such as ``score``, ``kl``, ``length`` and ``ended``. NaN is written as null.
    """
    metrics = {name: [_rounded(value) for value in values] for name, values in columns.items()}
    evaluation = Answers(step, [prompt[-1]["content"] for prompt in prompts], list(answers), metrics)
    _write_all(folder, [*_until(folder, step - 1), evaluation])


def keep_until(folder: Path, step: int) -> None:
    """Drop the answers of evaluations after ``step``, for a run that is resumed."""
    if (folder / FILE).exists():
        _write_all(folder, _until(folder, step))


def read(folder: Path) -> list[Answers]:
    """The evaluations of a run, by step; none if it has no answers.

    Lines that are cut or foreign are left out. The format of earlier versions, which kept the answers before training
    and those of the last evaluation in one line, is read too.
    """
    rows = sorted(_rows(folder), key=lambda row: row["step"])
    return [_evaluation(step, list(group)) for step, group in itertools.groupby(rows, key=lambda row: row["step"])]


def _evaluation(step: int, rows: Sequence[Mapping[str, Any]]) -> Answers:
    names = [name for name in dict.fromkeys(itertools.chain(*rows)) if name not in ("step", "prompt", "answer")]
    columns = {name: [_number(row.get(name)) for row in rows] for name in names}
    return Answers(step, [row["prompt"] for row in rows], [row["answer"] for row in rows], columns)


def _number(value: Any) -> float | None:
    """None if ``value`` is no number, or not finite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    rows = [row for row in _lines(folder / FILE) if isinstance(row.get("prompt"), str)]
    last = _last_evaluation(folder) if any("after" in row for row in rows) else 0
    for row in rows:
        if isinstance(row.get("step"), int) and isinstance(row.get("answer"), str):
            yield row
        elif isinstance(row.get("after"), str):  # the format of earlier versions
            prompt, before, after = (row.pop(name, None) for name in ("prompt", "before", "after"))
            if before is not None and last > 0:
                yield {"step": 0, "prompt": prompt, "answer": before}
            yield {"step": last, "prompt": prompt, "answer": after, **row}


def _last_evaluation(folder: Path) -> int:
    evaluations = (row for row in _lines(folder / "metrics.jsonl") if any(name.startswith("eval_") for name in row))
    return max((row["step"] for row in evaluations if isinstance(row.get("step"), int)), default=1)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    content = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in content.split("\n"):  # `splitlines` would split answers at other characters, such as U+2028
        try:
            row = record.loads(line)
        except ValueError:  # cut off
            continue
        if isinstance(row, dict):
            yield row


def _until(folder: Path, step: int) -> list[Answers]:
    return [evaluation for evaluation in read(folder) if evaluation.step <= step]


def _write_all(folder: Path, evaluations: Sequence[Answers]) -> None:
    lines = []
    for evaluation in evaluations:
        for number, (prompt, answer) in enumerate(zip(evaluation.prompts, evaluation.answers, strict=True)):
            metrics = {name: values[number] for name, values in evaluation.columns.items()}
            row = {"step": evaluation.step, "prompt": prompt, "answer": answer, **metrics}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    manifest.write_atomically(folder / FILE, "".join(lines))


def _rounded(value: float) -> float | None:
    """Six significant digits, which are more than a score or a KL has."""
    if isinstance(value, int):  # a number of tokens, or whether the answer ended
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
