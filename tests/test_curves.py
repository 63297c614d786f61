"""The curves of a run: its picture, and ``alignkit watch``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.cli import main
from alignkit.runs import curves, lock
from alignkit.runs.curves import Point
from alignkit.training.callbacks import Curves

LOGGED: list[dict[str, Any]] = [
    {"step": 0, "eval_score": -1.0, "eval_score_error": 0.25, "eval_loss": 3.0, "eval_runtime": 1.5},
    {"step": 1, "loss": 2.0, "score": -1.5, "kl_coef": 0.1, "learning_rate": 0.2, "seconds_training": 4.0},
    {"step": 2, "loss": 1.0, "score": math.nan, "kl_coef": 0.1, "learning_rate": 0.1, "entropy": 2.0},
    {"step": 3, "loss": 0.5, "score": 0.5, "kl_coef": 0.1, "learning_rate": 0.05, "entropy": 1.0},
    {"step": 3, "eval_score": 1.0, "eval_score_error": 0.5, "eval_loss": 1.0},
    {"step": 3, "train_runtime": 9.0, "train_loss": 1.2},
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in LOGGED) + '{"step": 4, "lo'
    )  # a line that is being written
    return file


def test_curves_are_what_changes_with_the_errors_of_held_out_points(metrics: Path) -> None:
    of_run = {curve.name: curve for curve in curves.read(metrics, ("score",))}

    assert list(of_run) == ["score", "loss", "entropy", "learning_rate"]
    assert of_run["score"].train == [Point(1, -1.5), Point(3, 0.5)]
    assert of_run["score"].held_out == [Point(0, -1.0, 0.25), Point(3, 1.0, 0.5)]
    assert curves.read(metrics, ("kl_coef",))[0].name == "kl_coef"  # even if it does not change


def test_the_picture_has_each_metric_and_is_the_same_for_the_same_curves(metrics: Path) -> None:
    curves.draw(metrics.parent, "runs/ppo: PPO", ("score",))
    svg = (metrics.parent / "curves.svg").read_bytes()
    texts = {element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    curves.draw(metrics.parent, "runs/ppo: PPO", ("score",))

    assert {"runs/ppo: PPO", "score", "loss", "entropy", "learning rate", "training", "held out"} <= texts
    assert (metrics.parent / "curves.svg").read_bytes() == svg
    assert (metrics.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in metrics.parent.iterdir()) == ["curves.png", "curves.svg", "metrics.jsonl"]


def test_sparklines_go_from_the_lowest_to_the_highest_value() -> None:
    rising = [Point(step, float(step)) for step in range(8)]

    assert curves.sparkline(rising) == "▁▂▃▄▅▆▇█"
    assert curves.sparkline(rising, width=4) == "▁▃▆█"
    assert curves.sparkline([Point(0, 3.0)] * 2) == "▁▁"
    assert curves.sparkline([]) == ""


class Drawn:
    """A run of which only the name and the folder count, and the times at which its curves are drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.times = 0.0, list[float]()
        self.lines: list[str] = []
        stage = type("Stage", (), {"summary": "", "watch": ()})
        config = type("Config", (), {"folder": "runs/sft", "stage": type("Selected", (), {"component": stage})})
        run: Any = type("Run", (), {"config": config, "folder": Path(), "say": self.lines.append})
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(curves, "draw", lambda *_: self.draw(seconds))
        self.callback = Curves(run)

    def draw(self, seconds: float) -> None:
        self.times.append(self.now)
        self.now += seconds

    def log(self, now: float) -> None:
        self.now = now
        state: Any = type("State", (), {"is_world_process_zero": True})
        self.callback.on_log(None, state, None)  # type: ignore[arg-type]


def test_drawing_takes_less_than_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Drawn(monkeypatch, seconds=2.0)
    for second in range(0, 1000, 5):
        run.log(float(second))

    assert run.times == [200, 400, 600, 800]  # so the first step does not wait for a picture


def test_a_picture_that_fails_is_one_line_and_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Drawn(monkeypatch, seconds=0.0)
    monkeypatch.setattr(curves, "draw", lambda *_: 1 / 0)
    for second in (205.0, 210.0, 5000.0):
        run.log(second)

    assert run.lines == ["warning: the curves could not be drawn: ZeroDivisionError: division by zero"]


@pytest.mark.draws_curves
def test_a_run_folder_has_its_curves_and_watch_shows_them(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("train.max_steps=4", "train.logging_steps=1", output="curves")
    capsys.readouterr()

    assert b"perplexity" in (folder / "curves.svg").read_bytes()
    assert main(["watch", str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"{folder}: finished at step 4" in output
    assert [line.split()[0] for line in output.splitlines() if line.strip()][3:5] == ["perplexity", "loss"]
    assert main(["watch", f"{folder}s"]) == 2
    assert f"watch: {folder}s is not the folder of a run. Did you mean 'sft'?" in capsys.readouterr().err


def test_watch_tells_a_run_that_trains_from_one_that_stopped(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("train.max_steps=2", output="stopped")
    unfinished = folder.rename(f"{folder}.unfinished")
    (unfinished / "alignkit.json").unlink()
    capsys.readouterr()
    assert main(["watch", str(folder)]) == 0
    assert "stopped at step 2; continue with --resume" in capsys.readouterr().out
    with lock.held(unfinished):
        assert main(["watch", str(folder)]) == 0
    assert "is training at step 2" in capsys.readouterr().out
    (unfinished.parent / f".{unfinished.name}.lock").write_text(str(dead_process()))
    assert not lock.is_held(unfinished)


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""], env=os.environ)
    process.wait()
    return process.pid
