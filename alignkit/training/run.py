"""A run: builds the models, the loss, the optimizer, the reward and the engine of a stage from its config.

``alignkit.training.execution`` trains with them. Importing this module imports torch.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import transformers
from torch import nn

from alignkit import data
from alignkit.batches import LossOutput, Sampling
from alignkit.config import DataConfig, named_code
from alignkit.data import held_out
from alignkit.data.chat_template import load_tokenizer
from alignkit.data.chat_tokenizer import today
from alignkit.data.streaming import RowStream
from alignkit.errors import AlignkitError
from alignkit.generation import rewards
from alignkit.models import device_and_dtype
from alignkit.protocols import Engine, Limits, RewardFunction
from alignkit.registry import checks
from alignkit.rows import Located
from alignkit.runs import base, curves, fingerprints, manifest
from alignkit.runs.plan import Plan
from alignkit.runs.resume import CODE, DAY, METRICS, start_day
from alignkit.training import arguments, deepspeed, loading, shard, trackers
from alignkit.training.callbacks import BestMetric, Curves, Interrupt, MetricsFile, Progress
from alignkit.training.learning import LearningCheck
from alignkit.training.loss_state import LossState, has_state, unchanged_by_evaluation

Args = TypeVar("Args", bound=transformers.TrainingArguments)


class Run:
    """One run of one stage: the class behind :class:`alignkit.Run`, which documents its members."""

    def __init__(self, plan: Plan, say: Callable[[str], None], resume: bool = False) -> None:
        self.plan = plan
        self.config = plan.config
        self.registry = plan.registry
        self.train_rows = plan.train_rows
        self.eval_rows = plan.eval_rows
        self.stream = plan.stream
        self.streamed_rows: int | None = None  # different rows of it that were trained on, when training has ended
        self.say = say
        self.folder = manifest.unfinished(plan.config.folder)
        self.parents = {role: parent.folder for role, parent in plan.parents.items()}
        self.records = {role: manifest.read(folder) for role, folder in self.parents.items()}
        if record := self.records.get("policy"):
            self.base = base.of_run(record, self.parents["policy"], say)
            kwargs = base.kwargs_of_run(plan.config.model_kwargs, self.base, record)
        else:
            self.base, kwargs = base.locate(plan.config.model, say), plan.config.model_kwargs
        self.model_kwargs = base.with_commit(kwargs, self.base)
        self.device = device_and_dtype.run_device(plan.config.train)
        self.dtype = device_and_dtype.run_dtype(plan.config.train)
        day = start_day(plan.config) if resume else None
        self.today = day or self.records.get("policy", {}).get("today") or today()
        self.skipped = len(plan.source.skipped)  # with the rows that the chat template rejects
        self.policy_learns_from = 0
        self.steps_between_checkpoints = 1
        self.is_planned = False
        self._loss_states: list[LossState] = []

    def surroundings(self) -> dict[str, Any]:
        """Everything that the result depends on apart from the config."""
        folder, plan = base.folder_of(self.base, self.model_kwargs.get("revision")), self.plan
        return {
            "the data": plan.source.fingerprint,
            "the held-out data": plan.eval_source.fingerprint if plan.eval_source else None,
            "the weights of the base": fingerprints.weights(folder) if folder else None,
            "the config.json of the base": fingerprints.config(folder) if folder else None,
            **{f"the {role} it goes on from": fingerprints.weights(run) for role, run in self.parents.items()},
            **{f"{CODE}{call}": file for call, file in named_code.fingerprints(plan.config.to_dict()).items()},
            "the chat template": fingerprints.text(self.tokenizer.chat_template),
            "the number format of this device": str(self.dtype).removeprefix("torch."),
            "the number of processes": str(self.processes),
            DAY: self.today,  # for chat templates that write the date
        }

    @property
    def processes(self) -> int:
        """The number of processes, under torchrun or accelerate launch."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @functools.cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The tokenizer of the policy that it starts from, or of the base, with a chat template and a pad token."""
        folder, special_tokens = self.parents.get("policy", self.base), self.config.data.special_tokens
        kwargs = base.of_repository(self.model_kwargs)
        return load_tokenizer(str(folder), self.config.chat_template, self.today, special_tokens, kwargs)

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        if "policy" in self.records:
            return list(self.records["policy"]["stop_ids"])
        return base.stop_ids(self.base, self.tokenizer, self.model_kwargs.get("revision"))

    @functools.cached_property
    def limits(self) -> Limits:
        """The numbers of tokens and positions of the base."""
        return base.limits(self.base, self.model_kwargs.get("revision"))

    def model(self, role: str, start: str = "policy") -> nn.Module:
        """The model of a role, made trainable by the tuner and started from the parent ``start``.

        A ``value`` or a ``reward`` has a scalar head. New weights depend only on ``train.seed``.
        """
        return loading.load(self, role, start)

    @functools.cached_property
    def base_weights(self) -> str | None:
        """The fingerprint of the base's weights."""
        folder = base.folder_of(self.base, self.model_kwargs.get("revision"))
        return fingerprints.weights(folder) if folder else None

    @property
    def score_pad_token_id(self) -> int | None:
        """The pad token; None if it also ends an answer."""
        pad = self.tokenizer.pad_token_id
        return None if pad in self.stop_ids else int(pad)

    def parent_rows(self, role: str) -> Sequence[Located]:
        """The rows that a parent was trained on; empty if there is no parent or its data are gone.

        Of a stream, they are the first ones.
        """
        if role not in self.records:
            return []
        record = self.records[role]
        table = record["config"]["stages"][record["stage"]]["data"]
        stage = self.registry.stage(record["stage"])
        try:
            config = DataConfig(**table)
            if config.streaming:
                return RowStream(self.registry, config, stage.rows).train_rows
            return held_out.split(data.load(self.registry, config, config.path, stage.rows), 0, config.seed).train
        except AlignkitError as error:
            self.say(f"the rows that {self.parents[role]} was trained on cannot be read: {error}")
            return []

    def loss(self) -> Callable[[Any], LossOutput]:
        """The loss: a function of the stage's batch that returns an :class:`alignkit.LossOutput`."""
        component, config = self.config.loss
        loss = checks.function(self.registry.describe(component, "build"), component.build(config))
        if has_state(loss):
            self._loss_states.append(LossState(loss))
            loss = unchanged_by_evaluation(loss)
        return checks.loss(self.registry.describe(component), loss)

    def training_arguments(self, cls: type[Args], **own: Any) -> Args:
        """``cls`` from the ``train`` table. Other arguments have the defaults of Transformers, not of ``cls``."""
        if not self.eval_rows:
            own = {"eval_strategy": "no", "eval_on_start": False} | own
        folder = self.folder / "checkpoints"
        own |= deepspeed.arguments(self)
        args = arguments.build(cls, self.config.train, folder, self.device, self.dtype, **own)
        if args.deepspeed:
            deepspeed.check_arguments(args, self)
        device_and_dtype.one_gpu(args, self.say)
        trackers.set_defaults(args.report_to, self.config.output)
        return args

    def reward(self) -> RewardFunction:
        """The reward. With ``reward.on_error=skip``, an answer that it rejects has the score NaN."""
        assert self.config.reward is not None
        score = rewards.build(self.config.reward, self)
        return rewards.skipping(score, self.say) if self.config.reward.config.on_error == "skip" else score

    def reward_run(self, path: str | None) -> RewardFunction:
        """The scores of the reward model in the run folder ``path``, which is one of the stage's roles.

        Raises:
            ConfigError: the reward's ``needs`` does not name this run.
        """
        source = f"the reward model in {path}" if path else "the reward model"
        return rewards.checked(source, rewards.of_role(self, path))

    def rollout(self, sampling: Sampling) -> Engine:
        """The rollout engine."""
        assert self.config.rollout is not None
        component, config = self.config.rollout
        run = {"run": self} if checks.accepts(component.build, "run") else {}
        engine = component.build(config, self.tokenizer, sampling, **run)
        engine = checks.function(self.registry.describe(component, "build"), engine)
        return checks.engine(self.registry.describe(component), engine, sampling)

    def optimizer(self, args: transformers.TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """The class (or factory) of the optimizer and its arguments, for ``Trainer(optimizer_cls_and_kwargs=...)``."""
        component, config = self.config.optimizer
        optimizer = checks.optimizer(self.registry.describe(component, "build"), component.build(config, args))
        if args.deepspeed:
            deepspeed.check_optimizer(*optimizer, self.registry.describe(component))
        shard.check_optimizer(self, optimizer[0])
        return optimizer

    def callbacks(self) -> list[transformers.TrainerCallback]:
        """The callbacks of every run, and those of plugins."""
        expected = "a list of TrainerCallback"
        from_plugins = itertools.chain(*self.registry.call("alignkit_callbacks", _are_callbacks, expected, run=self))
        own = [Progress(self), MetricsFile(self.folder / METRICS), Interrupt(self), LearningCheck(self), BestMetric()]
        if curves.can_draw():
            own.append(Curves(self))
        return [*own, *self._loss_states, *from_plugins]


def _are_callbacks(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, transformers.TrainerCallback) for one in value)
