"""One run of one stage: build data, model, loss and optimizer; train; save. The one place where hooks meet a run.

It reads top to bottom in :func:`execute`. Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import transformers
from torch import nn

from alignkit import data
from alignkit.batches import LossOutput, Sampling
from alignkit.config import DataConfig, training_args
from alignkit.data.chat_template import load_tokenizer, today
from alignkit.errors import AlignkitError, ConfigError, one_line
from alignkit.generation import rewards
from alignkit.models import adapters, device
from alignkit.protocols import Engine, Limits, Result, RewardFunction
from alignkit.registry import handover
from alignkit.rows import Located
from alignkit.runs import base, fingerprints, lock, manifest
from alignkit.runs.plan import Plan, is_made_by
from alignkit.runs.resume import DAY, METRICS, began, check_folder, last_checkpoint, prepare_folder
from alignkit.training import arguments, learning, loading
from alignkit.training.callbacks import BestMetric, Interrupt, Learning, MetricsFile, Progress, Resumed
from alignkit.training.loss_state import LossState, has_state, untouched_by_evaluation
from alignkit.training.randomness import evaluate_undisturbed
from alignkit.training.rehearsal import rehearse
from alignkit.training.saving import final_metrics, save

Args = TypeVar("Args", bound=transformers.TrainingArguments)


class Interrupted(AlignkitError):  # noqa: N818
    """The user stopped the run with Ctrl-C; a checkpoint was written."""


class Run:
    """One run of one stage. Stages and hooks use the members that :class:`alignkit.Run` lists."""

    def __init__(self, plan: Plan, say: Callable[[str], None], resume: bool = False) -> None:
        self.plan = plan
        self.config = plan.config
        self.registry = plan.registry
        self.train_rows = plan.train_rows
        self.eval_rows = plan.eval_rows
        self.say = say  # one line for the user
        self.folder = manifest.unfinished(plan.config.folder)  # while it trains
        self.parents = {role: parent.folder for role, parent in plan.parents.items()}
        self.records = {role: manifest.read(folder) for role, folder in self.parents.items()}
        self.base = base.locate(plan.config.model, say)
        if "policy" in self.parents:
            self.base = base.under(self.records["policy"], self.parents["policy"], say)
        self.device = device.run_device(plan.config.train)
        self.dtype = device.run_dtype(plan.config.train)
        self.today = (began(plan.config) if resume else None) or self.records.get("policy", {}).get("today") or today()
        self.skipped = len(plan.source.skipped)  # bad rows, those included that only the chat template refuses
        self.policy_learns_from = 0  # a stage may say the step before which it trains something else
        self.steps_between_checkpoints = 1  # a stage may say that only every so many steps can be gone on from
        self._loss_states: list[LossState] = []

    def surroundings(self) -> dict[str, Any]:
        """What the outcome depends on beside the config."""
        folder, plan = base.folder_of(self.base), self.plan
        return {
            "the data": plan.source.fingerprint,
            "the held-out data": plan.eval_source.fingerprint if plan.eval_source else None,
            "the weights of the base": fingerprints.weights(folder) if folder else None,
            **{f"the {role} it goes on from": fingerprints.weights(run) for role, run in self.parents.items()},
            "the chat template": fingerprints.text(self.tokenizer.chat_template),
            "the number format of this device": str(self.dtype).removeprefix("torch."),
            "the number of processes": str(self.processes),
            DAY: self.today,  # for chat templates that write the date
        }

    @property
    def processes(self) -> int:
        """How many processes train together, under torchrun or accelerate launch."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @functools.cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The tokenizer of the policy it goes on from, or of the base, with a chat template and a pad token."""
        folder, special_tokens = self.parents.get("policy", self.base), self.config.data.special_tokens
        return load_tokenizer(str(folder), self.config.chat_template, self.today, special_tokens)

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The tokens at which an answer ends."""
        if "policy" in self.records:
            return list(self.records["policy"]["stop_ids"])
        return base.stop_ids(self.base, self.tokenizer)

    @functools.cached_property
    def limits(self) -> Limits:
        """How many tokens and positions the base has."""
        return base.limits(self.base)

    def model(self, role: str, start: str = "policy") -> nn.Module:
        """The model of a role, made trainable by the tuner and started from the run that is the parent ``start``.

        A ``value`` or a ``reward`` has a scalar head. Fresh weights depend on ``train.seed`` alone.
        """
        tuner, config = self.config.tuner
        under = base.under(self.records[start], self.parents[start], self.say) if start in self.parents else self.base
        loaded: Any = loading.load(self, role, under)
        transformers.set_seed(self.config.train.get("seed", 42))
        has_head = start in self.records and self.records[start]["role"] in adapters.WITH_HEAD
        if role in adapters.WITH_HEAD:
            if not has_head:
                adapters.fresh_head(loaded, self.score_pad_token_id)
        else:
            loaded.generation_config.eos_token_id = self.stop_ids
            loaded.generation_config.pad_token_id = self.tokenizer.pad_token_id
        try:
            model: nn.Module = handover.model(self.registry.who(tuner, "wrap"), tuner.wrap(config, loaded, role))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"tuner '{tuner.name}' cannot be put on {self.config.model}: {one_line(error)}"
            ) from error
        if start in self.records and self.records[start]["weights"] == "adapter":
            model = adapters.continue_adapter(model, self.parents[start])
        loading.check_tuned(self, role, model)
        if role in adapters.WITH_HEAD:
            adapters.head_in_fp32(model)
        self.registry.call("alignkit_model_ready", run=self, role=role, model=model)
        loading.say_what_is_trained(self, role, model, under)
        return model

    @functools.cached_property
    def base_weights(self) -> str | None:
        """The fingerprint of what adapters sit on."""
        folder = base.folder_of(self.base)
        return fingerprints.weights(folder) if folder else None

    @property
    def score_pad_token_id(self) -> int | None:
        """The pad token, where it cannot be mistaken for the token that ends an answer."""
        pad = self.tokenizer.pad_token_id
        return None if pad in self.stop_ids else int(pad)

    def parent_rows(self, role: str) -> list[Located]:
        """The rows that a parent was trained on; none where there is no parent or its data are gone."""
        if role not in self.records:
            return []
        record = self.records[role]
        theirs = record["config"]["stages"][record["stage"]]["data"]
        stage = self.registry.stage(record["stage"])
        try:
            return data.load(self.registry, DataConfig(**theirs), theirs["path"], stage.rows).rows
        except AlignkitError as error:
            self.say(f"the rows that {self.parents[role]} was trained on cannot be read: {error}")
            return []

    def loss(self) -> Callable[[Any], LossOutput]:
        """The loss function: of the stage's batch type, to :class:`alignkit.LossOutput`."""
        component, config = self.config.loss
        loss = handover.function(self.registry.who(component, "build"), component.build(config))
        if has_state(loss):
            self._loss_states.append(LossState(loss))
            loss = untouched_by_evaluation(loss)
        return handover.loss(self.registry.who(component), loss)

    def training_arguments(self, cls: type[Args], **own: Any) -> Args:
        """``cls`` from the ``train`` table. What the table does not say has Transformers' default, not ``cls``'s."""
        if not self.eval_rows:
            own = {"eval_strategy": "no", "eval_on_start": False} | own
        folder = self.folder / "checkpoints"
        args = arguments.build(cls, self.config.train, folder, self.device, self.dtype, **own)
        device.one_gpu(args, self.say)
        return args

    def reward(self) -> RewardFunction:
        """The reward: a function of :class:`alignkit.Answers` and the stage's roles, to a checked score per answer.

        With ``reward.on_error=skip`` the score of an answer that the reward refuses is NaN.
        """
        assert self.config.reward is not None
        score = rewards.build(self.config.reward, self)
        return rewards.skipping(score, self.say) if self.config.reward.config.on_error == "skip" else score

    def reward_run(self, path: str | None) -> RewardFunction:
        """The scores of the reward model in the run folder ``path``; called with the roles that it is one of.

        Raises:
            ConfigError: ``needs`` of the reward did not name this run.
        """
        return rewards.of_role(self, path)

    def rollout(self, sampling: Sampling) -> Engine:
        """The engine that samples: a function of the policy, prompts as token ids and the stage's roles."""
        assert self.config.rollout is not None
        component, config = self.config.rollout
        run = {"run": self} if handover.accepts(component.build, "run") else {}
        given = component.build(config, self.tokenizer, sampling, **run)
        engine = handover.function(self.registry.who(component, "build"), given)
        return handover.engine(self.registry.who(component), engine, sampling)

    def optimizer(self, args: transformers.TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """The optimizer's class (or factory) and arguments, as ``Trainer(optimizer_cls_and_kwargs=...)`` takes them."""
        component, config = self.config.optimizer
        return handover.optimizer(self.registry.who(component, "build"), component.build(config, args))

    def callbacks(self) -> list[transformers.TrainerCallback]:
        """The run's own callbacks and those of plugins."""
        expected = "a list of TrainerCallback"
        theirs = itertools.chain(*self.registry.call("alignkit_callbacks", _are_callbacks, expected, run=self))
        own = [Progress(self), MetricsFile(self.folder / METRICS), Interrupt(self), Learning(self), BestMetric()]
        return [*own, *self._loss_states, *theirs]


def _are_callbacks(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(each, transformers.TrainerCallback) for each in given)


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
    trainer = handover.trainer(run.registry.who(stage, "build"), stage.build(run))
    handover.name_optimizer(run.registry.who(run.config.optimizer.component), trainer)
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
    more = handover.manifest_keys(run.registry.who(stage, "finish"), more)
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
