"""Run folders for the tests of the report, written without training: what a run records, with chosen numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit import yaml

BEFORE, AFTER = [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 5.0]  # scores: three wins, one tie; the mean rises by 1.25
HOSTILE = [
    "<script>document.title = 'broken'</script>",
    '<img src="https://example.com/x.png" onerror="document.title = \'broken\'">',
    "</p></li></ol></details></section><h1>Forged</h1>",
    "\u202eright to left\u202c and עברית",
    "x" * 100_000,
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; \x00 \ud800",
    "--> ]]> </style></title></svg><svg onload=\"document.title = 'broken'\">",
    "",
]


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    """A file of JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path, stage: str, logged: Sequence[dict[str, Any]], parents: dict[str, Path] | None = None, **more: Any
) -> Path:
    """A finished run folder with a manifest, a config and metrics, but without weights."""
    folder.mkdir(parents=True)
    reward = {"reward": {"name": "reward-model", "path": None}} if stage == "ppo" else {}
    config = {
        **{"model": "bundled:smollm2-135m", "output": str(folder.parent), "plugins": [stage], "chat_template": None},
        **{"tuner": {"name": "lora"}, "optimizer": {"name": "adamw"}},
        "stages": {stage: {"data": {"path": "rows.jsonl"}, "train": {}, **reward}},
    }
    known = {role: json.loads((path / "alignkit.json").read_text()) for role, path in (parents or {}).items()}
    record = {
        **{"manifest_version": 2, "stage": stage, "role": "reward" if stage == "rm" else "policy", "tuner": "lora"},
        **{"loss": "loss", "weights": "adapter", "model": {"name": "bundled:smollm2-135m"}},
        "fingerprints": {"weights": f"weights of {folder.name} {folder.parent.name}"},
        "parents": {
            role: {"folder": str(path.absolute()), "weights": known[role]["fingerprints"]["weights"]}
            for role, path in (parents or {}).items()
        },
        "data": {
            **{"source": "rows.jsonl", "fingerprint": "1", "format": "prompts"},
            **{"train_rows": 90, "eval_rows": 10, "skipped_rows": 0},
            "lengths": {"rows": 90, "median": 61.5, "longest": 214},
        },
        **{"metrics": {}, "steps": logged[-1]["step"] if logged else 0, "seconds": 90.0, "dtype": "float32"},
        **{"processes": 1, "finished": "2026-11-25T12:00:00Z", "versions": {"alignkit": "0.1.0"}, "config": config},
        **more,
    }
    (folder / "alignkit.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.dumps(config))
    write_lines(folder / "metrics.jsonl", logged)
    return folder


def losses(first: float, last: float, steps: int = 40) -> list[dict[str, Any]]:
    """The metrics of an SFT run whose held-out loss has an error."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": first, "eval_loss_error": 0.1, "eval_perplexity": 50.0}]
    lines += [{"step": n, "loss": first + (last - first) * n / steps, "learning_rate": 1 / n} for n in range(1, steps)]
    return [*lines, {"step": steps, "eval_loss": last, "eval_loss_error": 0.1, "eval_perplexity": 27.0}]


def scores(before: Sequence[float] = BEFORE, after: Sequence[float] = AFTER, kl: float = 4.0) -> list[dict[str, Any]]:
    """The metrics of a PPO run of eight steps."""

    def held_out(step: int, values: Sequence[float], kl: float) -> dict[str, Any]:
        score = {"eval_score": sum(values) / len(values), "eval_score_error": 0.6, "eval_kl": kl, "eval_kl_error": 0.4}
        return {"step": step, **score, "eval_length": 40.0 + step, "eval_eos_rate": 1.0}

    middle = [{"step": n, "loss": 0.1 / n, "score": n / 8, "kl": kl * n / 8, "entropy": 2.0 - n / 8} for n in (2, 4, 6)]
    return [held_out(0, before, 0.0), *middle, held_out(8, after, kl)]


def write_answers(
    folder: Path,
    texts: Sequence[str] = ("a", "b", "c", "d"),
    before: Sequence[float] = BEFORE,
    after: Sequence[float] = AFTER,
) -> None:
    """``answers.jsonl`` with the evaluations at steps 0 and 8."""
    rows = [
        {"step": step, "prompt": f"Prompt {n}: {text}", "answer": f"{when} {text}", "score": of_answers[n % 4]}
        for step, when, of_answers in ((0, "Before:", before), (8, "After:", after))
        for n, text in enumerate(texts)
    ]
    write_lines(folder / "answers.jsonl", rows)


def write_pairs(folder: Path) -> None:
    """``pairs.json`` of a reward model that is 70% right for neighbors in rank, and 90% for others."""
    distances = [(1, 40, 0.7, 0.05), (2, 20, 0.9, 0.04)]
    bins = [(0.55, 0.5, 0.08), (0.75, 0.7, 0.06), (0.95, 0.9, 0.03)]
    content = {
        "step": 8,
        "by_distance": [dict(zip(("distance", "pairs", "accuracy", "error"), row, strict=True)) for row in distances],
        "calibration": [
            {**dict(zip(("predicted", "observed", "error"), row, strict=True)), "pairs": 20} for row in bins
        ],
    }
    (folder / "pairs.json").write_text(json.dumps(content))


def write_pipeline(output: Path, texts: Sequence[str] = ("a", "b", "c", "d")) -> Path:
    """SFT, a reward model and PPO -> their folder."""
    sft = write_run(output / "sft", "sft", losses(4.0, 3.0))
    accuracies = [{"step": n, "eval_accuracy": 0.5 + n / 40, "eval_accuracy_error": 0.05} for n in (0, 4, 8)]
    rm = write_run(output / "rm", "rm", accuracies, {"policy": sft}, verdict="usable for PPO: 70.0%")
    ppo = write_run(output / "ppo", "ppo", scores(), {"policy": sft, "reward": rm})
    write_answers(ppo, texts)
    write_pairs(rm)
    return output
