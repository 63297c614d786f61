"""Trackers get every metric once, under stable names, with the settings and the answers, also after ``--resume``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import GOLD, SMALL, logs, ppo

from alignkit.cli import main
from alignkit.runs import answers

# A reward that ends the process, without a chance to clean up, when it scores answers of the last iteration.
KILLED = """
import os, pathlib, gold

def letters(prompts, answers):
    logged = pathlib.Path("runs/ppo.unfinished/metrics.jsonl")
    if os.environ.get("KILLED") and logged.exists() and "\\"step\\": 6" in logged.read_text():
        import time
        time.sleep(1)  # Trackio writes twice a second
        os._exit(9)
    return gold.letters(prompts, answers)
"""
OTHERS = ("train/global_step", "eval/answers")  # in Trackio, beside metrics
ITERATIONS = ["ppo.iterations=4", "ppo.eval_every=2", "ppo.save_every=2"]  # of two steps each


def alignkit(*words: str, **variables: str) -> int:
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "MPLCONFIGDIR": os.getcwd(), **variables}
    return subprocess.run([sys.executable, "-m", "alignkit", *words], env=env).returncode


def test_tensorboard_and_trackio_get_everything_once_and_a_resumed_run_continues(folder: Path) -> None:
    Path("killed.py").write_text(KILLED)
    (folder / "home").mkdir()
    words = ["train", "--plugin", "ppo", *SMALL, *GOLD[:2], "reward.call=killed:letters", *ITERATIONS]
    words += ["train.report_to=[tensorboard,trackio]"]
    assert alignkit(*words, KILLED="1", HOME=str(folder / "home")) == 9
    assert alignkit(*words, "--resume", HOME=str(folder / "home")) == 0
    run = folder / "runs" / "ppo"

    check_tensorboard(run)
    check_trackio(run)
    assert [path for path in (folder / "home").rglob("*") if path.is_file()] == []


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The metrics of ``metrics.jsonl`` by the names that Transformers' callbacks give them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in logs(run):
        for name, value in row.items():
            if name != "step":
                key = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                found.setdefault(key, []).append((row["step"], value))
    return found


def check_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars.keys() == expected(run).keys()
    for tag, points in expected(run).items():
        assert scalars[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], tag
    texts = {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert "kl_coef: 0.05" in texts["config/text_summary"][0][1]
    tables = texts["eval/answers/text_summary"]
    assert [step for step, _ in tables] == [0, 4, 8]
    for (_, table), evaluation in zip(tables, answers.read(run), strict=True):
        assert table.count("\n") == 1 + len(evaluation.answers)
        assert table.startswith("| prompt | answer | score | kl | length | ended |\n")
        assert all(f"| {prompt.replace('_', '')} | " in table for prompt in evaluation.prompts)


def check_trackio(run: Path) -> None:
    import sqlite3

    (file,) = (run.parent / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = [json.loads(config) for (config,) in database.execute("select config from configs")]
    assert file.stem == "runs"
    assert len({name for name, _, _ in rows}) == 1
    metrics = [json.loads(row) for _, _, row in rows]
    reported = Counter((row["train/global_step"], name) for row in metrics for name in row if not name.endswith(OTHERS))
    once = ("train/train_", "train/total_flos")  # of the last line, which Transformers' callback leaves out
    assert reported == Counter(
        (step, name) for name, points in expected(run).items() for step, _ in points if not name.startswith(once)
    )
    assert [config["ppo.kl_coef"] for config in configs] == [0.05]
    tables = [row["eval/answers"]["_value"] for row in metrics if "eval/answers" in row]
    assert [[row["answer"] for row in table] for table in tables] == [each.answers for each in answers.read(run)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_stages_of_one_command_are_runs_of_their_own(
    folder: Path, run_stage: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights & Biases, offline: the file of each run is in its folder, with its name, settings and metrics."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    lora = ("--plugin", "lora", "train.logging_steps=1", "train.report_to=wandb")
    dpo = run_stage("dpo", *lora, "dpo.response_length=4", "loss.beta=0.375")

    for run, metric in ((dpo.parent / "sft", b"eval/perplexity"), (dpo, b"eval/accuracy")):
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        content = file.read_bytes()
        assert metric in content
        assert content.count(b"eval/perplexity") == 0 or run.name == "sft"
    assert b"0.375" in content
    assert b"eval/answers" in content


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "train.report_to: 'tensorbord' is unknown. Did you mean 'tensorboard'? Trackers: azure_ml, "),
        ("dvclive", "train.report_to: dvclive is not installed: pip install dvclive"),
        ("[tensorboard,azure_ml]", "train.report_to: azure_ml is not installed: pip install azureml"),
    ],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_reported_by_check(
    folder: Path, capsys: pytest.CaptureFixture[str], report_to: str, message: str
) -> None:
    assert main(["check", "--plugin", "ppo", *SMALL, *GOLD, f"train.report_to={report_to}"]) == 2
    assert message in capsys.readouterr().err


def test_no_tracker_is_used_unless_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://localhost:1")
    seen: list[Any] = []
    monkeypatch.setattr("alignkit.training.trackers.KINDS", {})
    import transformers

    train = transformers.Trainer.train

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend([self.args.report_to, *(type(callback).__name__ for callback in self.callback_handler.callbacks)])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", watched)
    run = ppo(*GOLD, "ppo.iterations=1", "data.eval_size=0")

    assert seen[0] == []
    assert not any("Kubeflow" in name or "TensorBoard" in name for name in seen[1:])
    assert not {"tensorboard", "trackers.json"} & {path.name for path in run.iterdir()}


def test_a_tracker_that_fails_does_not_end_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run = ppo(*GOLD, "ppo.iterations=2", "train.report_to=tensorboard")

    output = capsys.readouterr().out
    assert output.count("warning: tensorboard failed, and gets no more metrics: ") == 1
    assert "No space left on device" in output
    assert json.loads((run / "alignkit.json").read_text())["steps"] == 4
