"""What ``alignkit evaluate`` measured is on the page of ``alignkit report``."""

from __future__ import annotations

from pathlib import Path

from reported_runs import write_pipeline
from test_report import words

from alignkit.reporting import report
from alignkit.runs import evaluations

PERPLEXITY = {"data": "texts.jsonl", "perplexity": 21.3, "perplexity_error": 1.1, "compared_with": "runs/sft"}
TASK = {"task": "hellaswag", "metric": "acc_norm", "value": 0.41, "error": 0.02, "compared_with": "runs/sft"}


def test_perplexity_and_tasks_are_shown_with_their_paired_changes(tmp_path: Path) -> None:
    output = write_pipeline(tmp_path / "runs")
    assert "No run was evaluated on texts or tasks" in words(report([output]).html)

    rows = {
        "perplexity": [{**PERPLEXITY, "difference": 0.08, "difference_error": 0.01}],
        "tasks": [{**TASK, "difference": -0.015, "difference_error": 0.006}],
    }
    evaluations.add(output / "ppo", rows)
    text = words(report([output]).html)
    assert "ppo perplexity on texts.jsonl 21.3 ± 1.1 +0.080 ± 0.010 nats per token runs/sft" in text
    assert "ppo hellaswag, acc_norm 41.0 ± 2.0% −1.50 ± 0.60% runs/sft" in text


def test_a_run_that_is_compared_with_nothing_and_a_foreign_file(tmp_path: Path) -> None:
    output = write_pipeline(tmp_path / "runs")
    alone = {
        **PERPLEXITY,
        "compared_with": None,
        "perplexity_error": None,
        "difference": None,
        "difference_error": None,
    }
    evaluations.add(output / "sft", {"perplexity": [alone]})
    (output / "ppo" / "evaluation.json").write_text('{"tasks": [{"task": 5}]}')
    text = words(report([output]).html)

    assert "sft perplexity on texts.jsonl 21.3 " in text
    assert "ppo : evaluation.json cannot be read" in text
