"""Callbacks of every run: progress, the metrics file, resuming, Ctrl-C and SIGTERM, and the best checkpoint."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit import progress
from alignkit.errors import ConfigError, one_line
from alignkit.models.transformers_internals import set_learning_rates
from alignkit.protocols import Run
from alignkit.runs import curves, manifest, stopping
from alignkit.training.meters import last_logged
from alignkit.training.unlogged import unlogged_total


class Progress(TrainerCallback):
    """A progress bar on a terminal or in a notebook, else lines; and a line per evaluation and round of sampling."""

    def __init__(self, run: Run) -> None:
        self.name = run.config.stage.component.name
        self.watch = run.config.stage.component.watch
        self.console = progress.console()
        self.bar: Bar | None = None
        self.tokens = (0.0, 0.0)  # tokens trained on, and the time, at the last log
        self.stepped = 0.0  # the time after the last step and its log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stepped = time.monotonic()
        seen = last_logged(state, "num_tokens") + unlogged_total(state, "num_tokens")
        self.tokens = (seen, self.stepped)
        if state.is_world_process_zero and progress.has_bars(self.console):
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
            self.bar = Bar(TextColumn(self.name), *columns, console=self.console)
            self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, now="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stepped = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            loss = f" loss {logs['eval_loss']:.4f}" if "eval_loss" in logs else ""
            self._print(f"step {state.global_step:>5}  held-out{loss}{self._watched(logs, 'eval_')}")
            seen, then = self.tokens
            self.tokens = (seen, then + time.monotonic() - self.stepped)  # evaluation is not training time
        elif "loss" in logs:
            now = f"loss {logs['loss']:.3f}"
            if "num_tokens" in logs:
                seen, then = self.tokens
                self.stepped = time.monotonic()
                self.tokens = (logs["num_tokens"], self.stepped)
                now += f"  {(logs['num_tokens'] - seen) / (self.tokens[1] - then):,.0f} tokens/s"
            now += self._watched(logs, "")
            seconds = {name: value for name, value in logs.items() if name.startswith("seconds_")}
            if seconds:
                split = ", ".join(f"{name.removeprefix('seconds_')} {value:.1f}" for name, value in seconds.items())
                now = f"{self._watched(logs, '').strip()}  {sum(seconds.values()):.1f} s ({split})"
            if seconds or not self.bar:
                self._print(f"step {state.global_step:>5}  {now}")
            else:
                self.bar.update(self.task, now=now)

    def _watched(self, logs: dict[str, float], prefix: str) -> str:
        line = ""
        for name in self.watch:
            if (value := logs.get(f"{prefix}{name}")) is not None:
                error = logs.get(f"{prefix}{name}_error")
                line += f"  {name} " + (f"{value:.4g}" if error is None else f"{value:.3f} ± {error:.3f}")
        return line

    def close(self) -> None:
        """Stop the bar. Called whether or not training succeeded."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


class MetricsFile(TrainerCallback):
    """Writes all logged metrics to the run folder's ``metrics.jsonl``, one JSON object per line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(manifest.plain_json({"step": state.global_step, **(logs or {})})) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a pickle that nothing reads; config.yaml in the run folder has the same settings
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "training_args.bin").unlink(missing_ok=True)


class Curves(TrainerCallback):
    """Draws the run's curves, as often as that takes less than a hundredth of the time, and at the end."""

    SHARE = 0.01
    FIRST = 2.0  # seconds that the first picture is expected to take: matplotlib is imported then

    def __init__(self, run: Run) -> None:
        self.say, self.folder, stage = run.say, run.folder, run.config.stage.component
        self.title, self.first = f"{run.config.folder}: {stage.summary}", stage.watch
        self.started, self.spent, self.last = time.monotonic(), 0.0, self.FIRST

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        elapsed = time.monotonic() - self.started
        if state.is_world_process_zero and self.spent + self.last <= self.SHARE * elapsed:
            self._draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.spent < math.inf:
            self._draw()

    def _draw(self) -> None:
        started = time.monotonic()
        try:
            curves.draw(self.folder, self.title, self.first)
        except Exception as error:  # a picture must not end a run
            self.say(f"warning: the curves could not be drawn: {one_line(error)}")
            self.spent = math.inf
        self.last = time.monotonic() - started
        self.spent += self.last


class Resumed(TrainerCallback):
    """Makes a resumed run use its own settings where the Trainer would use those of the checkpoint.

    These are how often it logs, evaluates and saves, and the learning rate of the first step, which the schedule of an
    extended run changes.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > state.max_steps:
            raise ConfigError(
                f"the run is at step {state.global_step}, and with these settings it ends at step {state.max_steps}"
            )
        state.compute_steps(args, state.max_steps)
        schedule = kwargs["lr_scheduler"]
        if isinstance(schedule, LambdaLR):
            rates = [b * f(schedule.last_epoch) for b, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            set_learning_rates(schedule, kwargs["optimizer"], rates)


def end_at_last_step(trainer: Any) -> None:
    """Train no further step if a run is resumed after its last one. The Trainer would, in the middle of an epoch."""
    get_batch_samples = trainer.get_batch_samples

    def batches(*arguments: Any, **keywords: Any) -> Any:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return [], None
        return get_batch_samples(*arguments, **keywords)

    trainer.get_batch_samples = batches


class Interrupt(TrainerCallback):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint and stop. A second signal stops immediately."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.received: signal.Signals | None = None
        self.close: Callable[[], None] = lambda: None  # restores the handlers, whether or not training succeeded

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close = stopping.handle(self._request, *stopping.SIGNALS)

    def _request(self, number: signal.Signals) -> None:
        self.received = number
        self.close()
        again = "press Ctrl-C again" if number == signal.SIGINT else "send SIGTERM again"
        self.run.say(f"stopping after this step, with a checkpoint; {again} to stop immediately")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.run.steps_between_checkpoints == 0 and self._is_requested(args.device):
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_requested(args.device)  # a signal during the last evaluation

    def _is_requested(self, device: torch.device) -> bool:
        """Whether a process has received a signal. All processes stop at the same step."""
        if torch.distributed.is_initialized():
            number = torch.tensor(self.received or 0, device=device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            if number:
                self.received = signal.Signals(int(number))
            return bool(number)
        return self.received is not None


class BestMetric(TrainerCallback):
    """Checks at each evaluation that ``train.metric_for_best_model`` is one of the held-out metrics."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        name, metrics = args.metric_for_best_model, kwargs.get("metrics") or {}
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            known = ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
            raise ConfigError(f"train.metric_for_best_model: there is no held-out metric '{name}'. Metrics: {known}")
