"""Seconds, positions and FLOPs of the phases of an iteration of PPO or GRPO, for alignkit's trainer and TRL's."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import flops
import pairs
import torch
import transformers

from alignkit import hookimpl

PHASES = ("sampling", "scoring", "training")


class Meter(transformers.TrainerCallback):
    """A callback for either trainer, and the plugin that hands itself to alignkit's.

    The first iteration warms up, the others are timed. FLOPs are counted in one more iteration after them.
    """

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.now: dict[str, float] = {}  # of this iteration
        self.cpu_clock = False
        self.timed = 0  # iterations before the one whose FLOPs are counted
        self.peak = 0.0  # MiB

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[transformers.TrainerCallback]:
        return [self]

    def clock(self) -> float:
        pairs.synchronize()
        return time.process_time() if self.cpu_clock else time.monotonic()

    # --- phases ------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counter = flops.Counter()
        self.phase, self.ended = "", self.clock()
        self.at = self._totals()

    def begin(self, phase: str) -> None:
        """End the current phase and begin this one; ``""`` is what belongs to none."""
        totals = self._totals()
        if self.phase:
            for name, value in totals.items():
                key = f"{name} {self.phase}"
                self.now[key] = self.now.get(key, 0.0) + value - self.at[name]
        self.phase, self.at = phase, totals

    def _totals(self) -> dict[str, float]:
        return {"seconds": self.clock(), "positions": self.counter.positions, "FLOPs": self.counter.flops}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "seconds_sampling" in logs:  # alignkit's
            self.now["tokens"] = logs["length"]
        elif "completions/mean_length" in logs:  # that of TRL's GRPO
            self.now["tokens"] = logs["completions/mean_length"]
        elif "objective/kl" not in logs:
            return
        self.begin("")
        before, self.ended = self.ended, self.clock()
        self.iterations.append({"seconds": self.ended - before, **self.now})
        self.now = {}
        self.counter.stop()
        if len(self.iterations) == self.timed:
            self.peak = pairs.peak()
            self.counter.start()

    def watch_alignkit(self) -> None:
        """Measure the phases of alignkit's trainer: its collector samples and scores answers before it trains."""
        from alignkit.online import OnlineTrainer

        def get_train_dataloader(trainer: Any) -> Any:
            collector = trainer.collector
            collector.sample = self.between("sampling", collector.sample, "scoring")
            collector.collect = self.between("", collector.collect, "training")
            return original(trainer)

        original = OnlineTrainer.get_train_dataloader
        OnlineTrainer.get_train_dataloader = get_train_dataloader  # type: ignore[method-assign]

    def watch_trl_grpo(self, trainer: Any) -> None:
        """Measure the phases of TRL's ``GRPOTrainer``: the method that scores answers calls one that samples them."""
        trainer._generate = self.between("sampling", trainer._generate, "scoring")
        score = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self.between("scoring", score, "training")

    def watch_trl(self, module: Any) -> None:
        """Measure the phases of TRL's PPO: a function samples, and advantages are whitened just before training."""

        def sample(model: Any, queries: Any, *args: Any) -> Any:
            sequences, logits = sampled(model, queries, *args)
            answers = sequences[:, queries.shape[1] :]
            ends = answers == (args[-1].eos_token_id or model.generation_config.eos_token_id)
            self.now["tokens"] = float((ends.cumsum(1) - ends.long() == 0).sum(1).float().mean())
            return sequences, logits

        sampled = self.between("sampling", module.batch_generation, "scoring")
        module.batch_generation = sample
        module.masked_whiten = self.between("scoring", module.masked_whiten, "training")

    def between(self, before: str, function: Callable[..., Any], after: str) -> Callable[..., Any]:
        """``function``, which runs in phase ``before`` and begins phase ``after`` when it returns."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.begin(before)
            result = function(*args, **kwargs)
            self.begin(after)
            return result

        return watched

    # --- results -----------------------------------------------------------------------------------------------------

    def numbers(self, answers: int, dtype: torch.dtype) -> pairs.Numbers:
        """Means over the timed iterations, of ``answers`` answers each.

        FLOPs are in units of 1e9, and NaN if the counter did not see each token of the answers, as in a CUDA graph.
        ``share`` is the share of the matrix rate, which is measured here.
        """
        timed, counted = self.iterations[1 : self.timed], self.iterations[self.timed]
        numbers = {name: statistics.mean(one[name] for one in timed) for name in timed[0] if "FLOPs" not in name}
        for phase in PHASES:
            positions = counted[f"positions {phase}"]
            seen = positions > answers * (counted["tokens"] - 1)  # an answer's last token is only sampled
            per_position = counted[f"FLOPs {phase}"] / positions if seen else math.nan
            numbers[f"GFLOP {phase}"] = per_position * numbers[f"positions {phase}"] / 1e9
        numbers["GFLOP"] = sum(numbers[f"GFLOP {phase}"] for phase in PHASES)
        numbers["rate"] = flops.matrix_rate(dtype, self.clock) / 1e9
        for part in ("", *(f" {phase}" for phase in PHASES)):
            numbers[f"share{part}"] = numbers[f"GFLOP{part}"] / numbers[f"seconds{part}"] / numbers["rate"]
        return {**numbers, "peak MiB": self.peak}


def table(measured: dict[str, list[pairs.Numbers]]) -> str:
    """Medians over the runs of each side: seconds, FLOPs and the share of the matrix rate, by phase."""
    lines = [f"{'':38}" + "".join(f"{name:>11}" for name in (*PHASES, "iteration"))]
    for side, runs in measured.items():
        rate = median(runs, "rate")
        labels = {"seconds": "seconds", "GFLOP": "GFLOP", "share": f"share of {rate:.3g} GFLOP/s"}
        for name, label in labels.items():
            values = [median(runs, f"{name} {phase}") for phase in PHASES] + [median(runs, name)]
            lines.append(f"{side:<10}{label:<28}" + "".join(f"{value:>11.4g}" for value in values))
    return "\n".join(lines)


def median(runs: list[pairs.Numbers], name: str) -> float:
    return statistics.median(one[name] for one in runs)
