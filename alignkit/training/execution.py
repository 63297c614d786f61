"""Trains a plan, up to the finished run folder. :func:`execute` reads top to bottom.

:class:`alignkit.training.run.Run` builds the components. Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import transformers

from alignkit.config import training_args
from alignkit.config.deepspeed import check_launch
from alignkit.errors import AlignkitError
from alignkit.models import memory
from alignkit.models.zero3 import held
from alignkit.protocols import Result
from alignkit.registry import checks
from alignkit.runs import base, lock, manifest
from alignkit.runs.plan import Plan
from alignkit.runs.resume import METRICS, check_folder, last_checkpoint, prepare_folder
from alignkit.runs.up_to_date import is_made_by
from alignkit.training import (
    checkpoints,
    deepspeed,
    learning,
    old_checkpoints,
    processes,
    shard,
    trackers,
    unlogged,
)
from alignkit.training.callbacks import Interrupt, Progress, Resumed, end_at_last_step
from alignkit.training.costs import Costs
from alignkit.training.randomness import evaluate_undisturbed
from alignkit.training.rehearsal import rehearse
from alignkit.training.run import Run
from alignkit.training.saving import final_metrics, save


class Interrupted(AlignkitError):  # noqa: N818
    """Ctrl-C or SIGTERM stopped the run. It has a checkpoint."""

    def __init__(self, message: str, signal: signal.Signals) -> None:
        super().__init__(message)
        self.signal = signal


def execute_all(plans: Sequence[Plan], *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> list[Result]:
    """Train plans in turn, those of a :class:`Pipeline`, and say the result of each.

    With ``overwrite``, the last one replaces a previous run.

    Raises:
        Interrupted, AlignkitError: as :func:`execute`.
    """
    check_launch([plan.config.train for plan in plans])
    for plan in plans:
        if plan.config.stage.component.role == "reward":  # fail before earlier stages train
            base.check_head(plan.config.model, plan.config.model_kwargs)
    results = []
    for plan in plans:
        say(f"\n{plan.config.stage.component.name}")
        results.append(execute(plan, resume=resume, overwrite=overwrite and plan is plans[-1], say=say))
        say(describe(plan, results[-1]))
    return results


def describe(plan: Plan, result: Result) -> str:
    """A finished run, such as ``"done in 40 s: held-out loss 2.1 -> 1.9, run folder runs/sft"``."""
    watched = ("loss", *plan.config.stage.component.watch)
    metric = next((name for name in watched if f"eval_{name}" in result.metrics), None)
    before, after = result.metrics.get(f"first_eval_{metric}"), result.metrics.get(f"eval_{metric}")
    change = f"held-out {metric} {before:.4f} -> {after:.4f}, " if before is not None and after is not None else ""
    return f"done in {result.seconds:.0f} s: {change}run folder {result.folder}"


def execute(plan: Plan, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> Result:
    """Train a plan and write its run folder. ``say`` prints a line for the user.

    Raises:
        Interrupted: the user stopped the run, which can be resumed.
        AlignkitError: an error that the user can fix.
    """
    started = time.monotonic()
    run, final, extensions = Run(plan, say, resume), plan.config.folder, list[str]()
    shard.check(run)
    with contextlib.ExitStack() as stack:
        if _is_first_process():  # it checks and writes the folder for all processes
            check_folder(plan.config, resume, overwrite)
            stack.enter_context(lock.held(run.folder))
            if resume and run.processes == 1 and manifest.is_run(run.folder):  # killed just before the rename
                manifest.finish(final)
                if is_made_by(plan.config):
                    return Result(final, manifest.read(final)["metrics"], time.monotonic() - started)
            extensions = prepare_folder(plan, run.surroundings(), resume, overwrite, say)
        stack.enter_context(_reported_failure(run))
        stack.enter_context(processes.connected())
        processes.check_alike(run)
        stack.enter_context(checkpoints.writing(run.folder))
        metrics = _train(run, resume, extensions, started)
    memory.release_freed()  # a trainer has reference cycles, and the next stage needs the memory of its models
    result = Result(final, metrics, time.monotonic() - started)
    run.registry.call("alignkit_run_end", run=run, result=result)
    return result


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _reported_failure(run: Run) -> Iterator[None]:
    """Call ``alignkit_run_failed`` if the run fails, and remove its folder if there is nothing to resume."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Interrupted):
            for hook_error in run.registry.call_all("alignkit_run_failed", run=run, error=error):
                run.say(str(hook_error))  # the first error is raised
        if _is_first_process() and last_checkpoint(run.folder) is None and not (run.folder / METRICS).exists():
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def _train(run: Run, resume: bool, extensions: list[str], started: float) -> dict[str, float]:
    """Build the stage's trainer, train from the last checkpoint, save, and return the final metrics."""
    stage = run.config.stage.component
    costs = Costs(run.device, started)
    run.registry.call("alignkit_run_start", run=run)
    trainer = checks.trainer(run.registry.describe(stage, "build"), stage.build(run))
    checks.name_optimizer(run.registry.describe(run.config.optimizer.component), trainer)
    training_args.check_batches(trainer.args, trainer.train_dataset)
    deepspeed.prepare(trainer, run)
    learning.watch_loss(trainer, run)
    trainer.remove_callback(transformers.PrinterCallback)  # Progress prints the metrics
    evaluate_undisturbed(trainer)
    old_checkpoints.delete_by_step(trainer)
    rehearse(run, trainer)
    shard.shard(run, trainer)
    unlogged.keep(trainer)
    trainer.add_callback(costs)
    trainer.accelerator.wait_for_everyone()  # until the first process has prepared the folder
    checkpoint = last_checkpoint(run.folder) if resume else None
    if resume:
        run.say(
            f"resuming from step {checkpoint.name.split('-')[1]}"
            if checkpoint
            else "there is no checkpoint to resume from: starting at step 0"
        )
    if checkpoint:
        trainer.args.eval_on_start = False  # done before the interruption
        trainer.add_callback(Resumed())
        end_at_last_step(trainer)
        checkpoints.name_in_errors(trainer, checkpoint)
        if extensions and schedule_depends_on_length(trainer.args):
            run.say(
                f"learning rate: from now on, it follows the {trainer.args.lr_scheduler_type.value} schedule of the "
                "longer run; the steps so far followed that of the shorter run. The result differs from that of one "
                "run of this length"
            )
    with trackers.reporting(trainer, run):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, Progress | Interrupt):
                    callback.close()
        received = (c.received for c in trainer.callback_handler.callbacks if isinstance(c, Interrupt))
        if stopped_by := next(received, None):
            by = " by SIGTERM" if stopped_by == signal.SIGTERM else ""
            raise Interrupted(
                f"stopped{by} at step {trainer.state.global_step}. To continue, add --resume to the same command",
                stopped_by,
            )
        more = stage.finish(run, trainer) if stage.finish else {}
        more = checks.manifest_keys(run.registry.describe(stage, "finish"), more)
        metrics = final_metrics(trainer)
    # frozen weights were checked when they were loaded; those in 4 bits may be stored as floats that are no numbers
    weights = ((name, held(p)) for name, p in trainer.model.named_parameters() if p.requires_grad)
    learning.check_weights(weights, "the run was not finished: the trained model")
    save(run, run.plan.source, run.plan.eval_source, trainer, metrics, more, costs)
    if trainer.is_world_process_zero():
        manifest.finish(run.config.folder)
    trainer.accelerator.wait_for_everyone()
    return metrics


def schedule_depends_on_length(args: transformers.TrainingArguments) -> bool:
    """Whether the learning rate of a step depends on the total number of steps."""
    constant = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
    return args.lr_scheduler_type.value not in constant or 0 < args.warmup_steps < 1
