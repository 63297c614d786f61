"""Shared code of the benchmarks beside TRL.

A benchmark trains every side in a process of its own, which is the benchmark's script again with ``--side``. The sides
run in turns, and only ratios of neighboring runs are compared, because absolute times mean little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from alignkit import hookimpl
from alignkit.models import run_dtype

Numbers = dict[str, float]  # what one run measured

TRAIN = {  # of every side: nothing but training is measured
    "use_cpu": not torch.accelerator.is_available(),  # without it TRL refuses bf16 on a CPU
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "report_to": "none",
}


class Meter(transformers.TrainerCallback):
    """Time from the end of the warm-up to that of the last step, peak memory and losses.

    A callback for either trainer, and a plugin that hands itself to alignkit's.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up  # steps that are not timed
        self.marks: list[tuple[float, float]] = []  # seconds of the clock and of the CPU
        self.peak = 0.0  # MiB
        self.losses: list[float] = []  # as logged, one a step

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[transformers.TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.warm_up, state.max_steps):
            synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))
        if state.global_step == state.max_steps:
            self.peak = peak()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = [log["loss"] for log in state.log_history if "loss" in log]

    @property
    def seconds(self) -> float:
        return self.marks[1][0] - self.marks[0][0]

    @property
    def cpu_seconds(self) -> float:
        return self.marks[1][1] - self.marks[0][1]


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The training arguments of a benchmark with ``--steps`` and ``--batch-size``, for either side."""
    return {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "bf16": run_dtype({}) is torch.bfloat16,
        **TRAIN,
    }


def trl_model(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """``model_init_kwargs`` and ``peft_config`` with which TRL trains what ``--tuner`` trains in alignkit."""
    import peft

    if options.tuner == "full":
        return {"dtype": torch.float32}, None
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return {"dtype": run_dtype({})}, config


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak() -> float:
    """MiB: of the GPU where there is one, otherwise of the process, its libraries included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux; macOS reports bytes


def alignkit_trainer(settings: dict[str, Any], meter: Meter) -> tuple[Any, Any]:
    """alignkit's trainer for a config, watched by ``meter`` and not yet trained, and its run."""
    from alignkit.config import resolve
    from alignkit.registry import Registry
    from alignkit.runs import make_plan
    from alignkit.training import Run

    registry = Registry()
    run = Run(make_plan(registry, resolve(registry, {}, settings)), print)
    run.folder.mkdir(parents=True)
    trainer = run.config.stage.component.build(run)
    trainer.add_callback(meter)
    return trainer, run


def parser(description: str | None, sides: Sequence[str], runs: int = 3) -> argparse.ArgumentParser:
    """The options of every benchmark; ``--side`` and ``--result`` are those of a process that trains one side."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--runs", type=int, default=runs, help="of each side")
    options.add_argument("--model", default="bundled:smollm2-135m", help="a folder, a hub id or a bundled name")
    options.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    options.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return options


def measure(side: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run this script again as a process that trains one side; what it wrote to ``--result``, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, *sys.argv, "--side", side, "--result", str(result), *arguments]
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env={**os.environ, **quiet, **environment}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout}{done.stderr}")
        return dict(json.loads(result.read_text(encoding="utf-8"))) if result.exists() else {}


def in_turns(sides: Sequence[str], runs: int, measure: Callable[[str, int], Numbers]) -> dict[str, list[Numbers]]:
    """Run every side, then every side again; ``measure`` gets a side and the number of the turn."""
    measured: dict[str, list[Numbers]] = {side: [] for side in sides}
    for turn in range(runs):
        for side in sides:
            measured[side].append(measure(side, turn))
    return measured


def line(side: str, numbers: Numbers) -> str:
    """One run as it is printed."""
    return f"{side:<9} " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def ratios(above: list[Numbers], below: list[Numbers], name: str) -> list[float]:
    """A number's ratios in neighboring runs."""
    return [one[name] / other[name] for one, other in zip(above, below, strict=True)]


def spread(label: str, values: Sequence[float]) -> str:
    """The median and the extremes of some ratios."""
    return f"{label:<11} median {statistics.median(values):.3f}   min {min(values):.3f}   max {max(values):.3f}"


def convert(model: str) -> None:
    """Convert a bundled model in a process of its own, before anything is measured."""
    locate = "import sys; from alignkit.runs import locate_model; locate_model(sys.argv[1], print)"
    subprocess.run([sys.executable, "-c", locate, model], check=True)
