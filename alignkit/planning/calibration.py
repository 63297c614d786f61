"""The time of a run, extrapolated from a few microbatches and decode steps: ``alignkit plan --time``.

The run is built as for training, on the device and the data of the run, in a temporary folder. Each part of the run
gets a range: the shortest and the longest time that the measurements allow. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.errors import ConfigError
from alignkit.registry import checks
from alignkit.runs.plan import Plan

if TYPE_CHECKING:
    from transformers import Trainer

    from alignkit.protocols import Run

Seconds = tuple[float, float]  # at least, at most

MICROBATCHES = 3  # the first is a warm-up
DECODED = 8  # tokens
SPREAD = (0.8, 1.25)  # beyond the fastest and the slowest microbatch, for rows of other lengths and a busy machine
FORWARD = (0.25, 0.5)  # the share of a forward pass in a microbatch with gradients, with and without checkpointing


class Time(NamedTuple):
    """The time of a run by its parts, such as "training", on the device that was measured."""

    parts: Mapping[str, Seconds]
    device: str

    @property
    def total(self) -> Seconds:
        """The sum of the parts."""
        low, high = (sum(each) for each in zip(*self.parts.values(), strict=True))
        return low, high


def calibrate(plan: Plan, device: str) -> Time:
    """Build the run of a plan on this device, measure two microbatches and eight decode steps, and extrapolate.

    Raises:
        ConfigError: a run that it starts from is not trained yet, or ``device`` is not the device of this machine.
        AlignkitError: the run cannot start.
    """
    from alignkit.models.device_and_dtype import run_device
    from alignkit.training import run as training

    class ShortRun(training.Run):
        def callbacks(self) -> list[Any]:
            return []

    here = run_device(plan.config.train)
    if here.type != device:
        raise ConfigError(f"the plan is for {device}, and a run on this machine would use {here.type}")
    for role, parent in plan.parents.items():
        if parent.manifest is None:
            raise ConfigError(f"the {role} comes from {parent.folder}, which is trained first")
    stage = plan.config.stage.component
    with tempfile.TemporaryDirectory() as folder:
        run = ShortRun(_short(plan, folder), lambda line: None)
        run.folder.mkdir(parents=True)
        began = time.monotonic()
        trainer = checks.trainer(plan.registry.describe(stage, "build"), stage.build(run))
        loading = time.monotonic() - began
        parts = (stage.calibrate or of_batches)(plan, run, trainer)
    return Time({"loading": (loading, loading), **parts}, _name(here))


def _short(plan: Plan, folder: str) -> Plan:
    """The plan of a run of a few microbatches, each with an optimizer step, that neither evaluates nor saves."""
    of_whole_run = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "report_to")
    train = {key: value for key, value in plan.config.train.items() if key not in of_whole_run}
    train |= {"max_steps": MICROBATCHES, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    train |= {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "eval_on_start": False}
    config = dataclasses.replace(plan.config, output=folder, train=train)
    return dataclasses.replace(plan, config=config, eval_rows=[], eval_source=None)


class Measured(NamedTuple):
    """Seconds of microbatches, forward and backward, and of optimizer steps."""

    microbatches: list[float]
    optimizer: list[float]

    def training(self, microbatches: float, steps: float) -> Seconds:
        """The seconds of so many microbatches and optimizer steps."""
        low, high = (
            share * (microbatches * pick(self.microbatches) + steps * pick(self.optimizer))
            for share, pick in zip(SPREAD, (min, max), strict=True)
        )
        return low, high


def measure(trainer: Trainer) -> Measured:
    """Train, and measure each microbatch but the first; every one has an optimizer step."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    def now() -> float:
        if trainer.args.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.monotonic()

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = now()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.computed = now()
            measured.microbatches.append(self.computed - self.began)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            measured.optimizer.append(now() - self.computed)

    measured = Measured([], [])
    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Measured(measured.microbatches[1:] or measured.microbatches, measured.optimizer[1:] or measured.optimizer)


def of_batches(plan: Plan, run: Run, trainer: Trainer) -> dict[str, Seconds]:
    """The parts of a run that trains on the batches of its data loader, and evaluates on the held-out rows."""
    train, measured = plan.config.train, measure(trainer)
    batches, accumulated = len(trainer.get_train_dataloader()), train.get("gradient_accumulation_steps", 1)
    epochs, steps = train.get("num_train_epochs", 3), train.get("max_steps", -1)
    microbatches = steps * accumulated if steps > 0 else math.ceil(batches * epochs)
    steps = steps if steps > 0 else math.ceil(math.ceil(batches / accumulated) * epochs)
    parts = {"training": measured.training(microbatches, steps)}
    if count := evaluations(plan, steps, math.ceil(epochs)):
        low, high = measured.training(len(plan.eval_rows) / train.get("per_device_train_batch_size", 8), 0)
        answers = _seconds_of_answers(plan, run, trainer)
        parts["evaluation"] = count * (FORWARD[0] * low + answers / 2), count * (FORWARD[1] * high + answers)
    return parts


def evaluations(plan: Plan, steps: int, epochs: int) -> int:
    """The number of evaluations of a run, with the one before training."""
    train, every = plan.config.train, plan.config.train.get("eval_steps") or plan.config.train.get("logging_steps", 500)
    strategy = train.get("eval_strategy", "no")
    if strategy == "no" or not plan.eval_rows:
        return 0
    every = math.ceil(steps * every) if every < 1 else every
    during = epochs if strategy == "epoch" else math.ceil(steps / every)
    return int(during + bool(train.get("eval_on_start")))


def _seconds_of_answers(plan: Plan, run: Run, trainer: Trainer) -> float:
    """The seconds of the answers of one evaluation, if the stage samples any."""
    from alignkit.batches import Sampling
    from alignkit.generation import sample
    from alignkit.models import Roles

    config = plan.config.stage.config
    if not (prompts := min(getattr(config, "eval_prompts", 0), len(plan.eval_rows))):
        return 0.0
    size = min(prompts, trainer.args.per_device_eval_batch_size)
    model: Any = trainer.accelerator.unwrap_model(trainer.model).eval()
    ids = run.tokenizer("a " * 64)["input_ids"][:64]
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer.accelerator.autocast())
        policy = stack.enter_context(model.using("policy")) if isinstance(model, Roles) else model
        first, step = decoding(lambda n: sample(policy, run.tokenizer, [ids] * size, Sampling(n, 1.0, ()), run.say))
    return math.ceil(prompts / size) * (first + config.response_length * step)


def decoding(sample: Callable[[int], Any]) -> Seconds:
    """The seconds to the first token of answers, and of each further one. ``sample`` samples so many tokens."""

    def seconds(tokens: int) -> float:
        began = time.monotonic()
        sample(tokens)  # it returns Python integers, so the device is done
        return time.monotonic() - began

    sample(1)  # the first call checks the model
    first = seconds(1)
    return first, max(0.0, (seconds(1 + DECODED) - first) / DECODED)


def _name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
