"""Trains one plan, from its check to the finished run folder. :func:`execute` reads top to bottom.

``alignkit.training.run`` builds the components. Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator

import transformers

from alignkit.config import training_args
from alignkit.errors import AlignkitError
from alignkit.protocols import Result
from alignkit.registry import handover
from alignkit.runs import lock, manifest
from alignkit.runs.plan import Plan, is_made_by
from alignkit.runs.resume import METRICS, check_folder, last_checkpoint, prepare_folder
from alignkit.training import learning
from alignkit.training.callbacks import Interrupt, Progress, Resumed
from alignkit.training.randomness import evaluate_undisturbed
from alignkit.training.rehearsal import rehearse
from alignkit.training.run import Run
from alignkit.training.saving import final_metrics, save


class Interrupted(AlignkitError):  # noqa: N818
    """The user stopped the run with Ctrl-C; a checkpoint was written."""


def execute(plan: Plan, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> Result:
    """Train, from the plan to the finished run folder.

    Raises:
        Interrupted: Ctrl-C; the run can be resumed.
        AlignkitError: anything that the user can mend.
    """
    started = time.monotonic()
    run, final, grown = Run(plan, say, resume), plan.config.folder, list[str]()
    with contextlib.ExitStack() as stack:
        if _is_first_process():  # it looks and writes for all
            check_folder(plan.config, resume, overwrite)
            stack.enter_context(lock.held(run.folder))
            if resume and run.processes == 1 and manifest.is_run(run.folder):  # killed just before its renaming
                manifest.finish(final)
                if is_made_by(plan.config):
                    return Result(final, manifest.read(final)["metrics"], time.monotonic() - started)
            grown = prepare_folder(plan, run.surroundings(), resume, overwrite)
        stack.enter_context(_failure_told(run))
        metrics = _train(run, resume, grown, started)
    gc.collect()  # a trainer is full of cycles, and the next stage needs the memory of its models
    result = Result(final, metrics, time.monotonic() - started)
    run.registry.call("alignkit_run_end", run=run, result=result)
    return result


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _failure_told(run: Run) -> Iterator[None]:
    """Tell plugins when a run fails, and leave no folder behind that has nothing to go on from."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Interrupted):
            for another in run.registry.call_all("alignkit_run_failed", run=run, error=error):
                run.say(str(another))  # the first error is the one to raise
        if _is_first_process() and last_checkpoint(run.folder) is None and not (run.folder / METRICS).exists():
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def _train(run: Run, resume: bool, grown: list[str], started: float) -> dict[str, float]:
    """Build the stage's trainer, train from the last checkpoint on, and save; the final metrics."""
    stage = run.config.stage.component
    run.registry.call("alignkit_run_start", run=run)
    trainer = handover.trainer(run.registry.describe(stage, "build"), stage.build(run))
    handover.name_optimizer(run.registry.describe(run.config.optimizer.component), trainer)
    training_args.check_batches(trainer.args, trainer.train_dataset)
    learning.watch_loss(trainer, run)
    trainer.remove_callback(transformers.PrinterCallback)  # Progress speaks for it
    evaluate_undisturbed(trainer)
    rehearse(run, trainer)
    trainer.accelerator.wait_for_everyone()  # until the first process has prepared the folder
    checkpoint = last_checkpoint(run.folder) if resume else None
    if resume:
        run.say(f"resuming from step {checkpoint.name.split('-')[1]}" if checkpoint else "nothing to resume: starting")
    if checkpoint:
        trainer.args.eval_on_start = False  # the first attempt did
        trainer.add_callback(Resumed())
        if grown and schedule_depends_on_length(trainer.args):
            run.say(
                f"learning rate: from here on the {trainer.args.lr_scheduler_type.value} schedule is that of the "
                "longer run; the steps so far followed the shorter one's. The result is not that of one run of this "
                "length"
            )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress | Interrupt):
                callback.close()
    if any(isinstance(c, Interrupt) and c.asked for c in trainer.callback_handler.callbacks):
        raise Interrupted(f"stopped at step {trainer.state.global_step}. The same command with --resume goes on")

    more = stage.finish(run, trainer) if stage.finish else {}
    more = handover.manifest_keys(run.registry.describe(stage, "finish"), more)
    metrics = final_metrics(trainer)
    learning.check_weights(trainer.model.named_parameters(), "the trained model. Nothing was finished")
    save(run, run.plan.source, trainer, metrics, more, time.monotonic() - started)
    if trainer.is_world_process_zero():
        manifest.finish(run.config.folder)
    trainer.accelerator.wait_for_everyone()
    return metrics


def schedule_depends_on_length(args: transformers.TrainingArguments) -> bool:
    """Whether a step's learning rate depends on how many steps there are in all."""
    constant = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
    return args.lr_scheduler_type.value not in constant or 0 < args.warmup_steps < 1
