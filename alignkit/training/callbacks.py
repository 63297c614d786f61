"""What every run does beside training: show progress, write metrics, stop on Ctrl-C or where nothing is learnt."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import AlignkitError, ConfigError
from alignkit.models import Roles
from alignkit.models.transformers_internals import set_learning_rates
from alignkit.protocols import Run
from alignkit.runs import manifest
from alignkit.training.meters import last_logged


class Progress(TrainerCallback):
    """A bar on a terminal, plain lines elsewhere; on both a line for every evaluation and every round of sampling."""

    def __init__(self, run: Run) -> None:
        self.name = run.config.stage.component.name
        self.watch = run.config.stage.component.watch
        self.console = Console(highlight=False)
        self.bar: Bar | None = None
        self.tokens = (0.0, time.monotonic())  # as of the last log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens = (last_logged(state, "num_tokens"), time.monotonic())
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
            self.bar = Bar(TextColumn(self.name), *columns, console=self.console)
            self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, now="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
            self.tokens = (self.tokens[0], time.monotonic())  # evaluation is not training time
        elif "loss" in logs:
            now = f"loss {logs['loss']:.3f}"
            if "num_tokens" in logs:
                seen, then = self.tokens
                self.tokens = (logs["num_tokens"], time.monotonic())
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
        told = ""
        for name in self.watch:
            if (value := logs.get(f"{prefix}{name}")) is not None:
                error = logs.get(f"{prefix}{name}_error")
                told += f"  {name} " + (f"{value:.4g}" if error is None else f"{value:.3f} ± {error:.3f}")
        return told

    def close(self) -> None:
        """Give the terminal back, however training ended."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


class MetricsFile(TrainerCallback):
    """Everything that is logged, one JSON object a line, in the run folder's ``metrics.jsonl``."""

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
                file.write(json.dumps(manifest.finite({"step": state.global_step, **(logs or {})})) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a pickle that nothing reads: the run folder's config.yaml says the same
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "training_args.bin").unlink(missing_ok=True)


class Resumed(TrainerCallback):
    """Lets a run that goes on from a checkpoint follow its own settings where the Trainer would take the checkpoint's.

    Those are how often it logs, evaluates and saves, and the learning rate of the first step, where the schedule of a
    run that was made longer has another.
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


class Interrupt(TrainerCallback):
    """Ctrl-C finishes the step, writes a checkpoint and stops; a second one stops at once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.asked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self.former = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.former)
        self.run.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked and state.global_step % self.run.steps_between_checkpoints == 0:
            control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Give Ctrl-C back, however training ended."""
        if hasattr(self, "former") and not self.asked:
            signal.signal(signal.SIGINT, self.former)


PATIENCE = 10  # optimizer steps with gradients of zero before a run stops


class Learning(TrainerCallback):
    """Stops a run whose policy gets no gradient, and one whose held-out loss is not a number."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.learns = bool(os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED"))
        self.zero = 0  # optimizer steps so far whose gradients were all zero

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.learns or state.global_step < self.run.policy_learns_from:
            return
        has_roles = isinstance(model, Roles)
        trained = model.trained("policy") if has_roles else model.named_parameters()
        gradients = [p.grad for _, p in trained if p.requires_grad and p.grad is not None]
        if not gradients:
            self._stop("no weight of the policy has a gradient")
        # A batch of answers that all score alike teaches a policy nothing; other losses always do.
        self.learns = has_roles or any(bool(gradient.any()) for gradient in gradients)
        self.zero += not self.learns
        if self.zero == PATIENCE:
            self._stop(f"all gradients of the first {PATIENCE} steps are zero")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.zero and not self.learns and state.global_step >= state.max_steps:
            self._stop("all gradients were zero")

    def _stop(self, why: str) -> None:
        tuner, stage = self.run.config.tuner.component, self.run.config.stage.component
        raise AlignkitError(
            f"{why}: nothing would be learnt. What {self.run.registry.describe(tuner)} trains has no effect on the "
            f"loss of {self.run.registry.describe(stage)}"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = (metrics or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise AlignkitError(f"the held-out loss at step {state.global_step} is {loss}. Nothing was finished")


class BestMetric(TrainerCallback):
    """Looks at the first evaluation for the metric by which the best checkpoint is chosen."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        name, metrics = args.metric_for_best_model, kwargs.get("metrics") or {}
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            known = ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
            raise ConfigError(f"train.metric_for_best_model: there is no held-out metric '{name}'. Metrics: {known}")
