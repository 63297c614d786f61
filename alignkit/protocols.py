"""The objects that plugins receive: a run, its plan, its config and its result, and the reward and the engine of a run.

Plugins, and the packages below ``training``, use only these members. The classes that implement the protocols
(``alignkit.training.run.Run``, ``alignkit.runs.plan.Plan``, ``alignkit.config.resolve.RunConfig``) have others,
which may change. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from alignkit.batches import Answers, LossOutput, SampledAnswers, Sampling
from alignkit.rows import Located

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

Args = TypeVar("Args", bound="TrainingArguments")


class RewardFunction(Protocol):
    """A reward: a function that returns a checked score for each answer; higher is better.

    ``roles`` is the stage's :class:`alignkit.models.Roles`, which contains the reward model if there is one. A reward
    that calls another reward passes it on. It is None outside training.
    """

    def __call__(self, answers: Answers, roles: nn.Module | None = None) -> list[float]: ...


class Engine(Protocol):
    """A rollout engine: a function of the policy and prompts that returns checked answers, all as token ids.

    It returns ``Sampling.samples`` answers to the first prompt, then those to the second, and so on, with
    log-probabilities if the engine computes them. ``roles`` is as in :class:`RewardFunction`.
    """

    def __call__(self, policy: Any, prompts: list[list[int]], roles: nn.Module | None = None) -> SampledAnswers: ...


class Limits(NamedTuple):
    """The limits of a model's input, and its number of layers, from its config; None if the config lacks them."""

    rows: int | None  # of its embeddings
    positions: int | None  # the longest sequence, in tokens
    learnt: bool  # positions have embeddings too, so a longer sequence is an error
    layers: int | None = None


class Selected(Protocol):
    """A component that a config selects, with its settings."""

    @property
    def component(self) -> Any:
        """The component, such as an :class:`alignkit.Stage`."""

    @property
    def config(self) -> Any:
        """Its settings, an instance of ``component.config``."""


class RunConfig(Protocol):
    """Every setting of one run of one stage."""

    @property
    def model(self) -> str:
        """The base model: a hub id, a folder, or ``bundled:smollm2-135m``."""

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for the base model that the user set."""

    @property
    def output(self) -> str:
        """The folder of all stages' run folders."""

    @property
    def folder(self) -> Path:
        """The folder of the finished run."""

    @property
    def plugins(self) -> list[str]:
        """The plugins that the user named."""

    @property
    def chat_template(self) -> str | None:
        """The file of a chat template that replaces the model's."""

    @property
    def stage(self) -> Selected:
        """The stage."""

    @property
    def tuner(self) -> Selected:
        """The tuner."""

    @property
    def optimizer(self) -> Selected:
        """The optimizer."""

    @property
    def loss(self) -> Selected:
        """The loss."""

    @property
    def reward(self) -> Selected | None:
        """The reward; None if the stage uses none."""

    @property
    def rollout(self) -> Selected | None:
        """The rollout engine; None if the stage uses none."""

    @property
    def data(self) -> Any:
        """The ``data`` table, an ``alignkit.config.DataConfig``."""

    @property
    def train(self) -> dict[str, Any]:
        """The ``train`` table, by the names of ``TrainingArguments``: what differs from their defaults."""

    @property
    def parents(self) -> dict[str, str | None]:
        """Role -> the run folder that it starts from, ``"base"`` for the base model, or None if the user set none."""

    def to_dict(self) -> dict[str, Any]:
        """The settings in the shape of a config file."""


class Parent(Protocol):
    """A run that another run starts from."""

    @property
    def folder(self) -> Path:
        """Its run folder."""

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Its manifest; None if the same command trains it first."""


class Plan(Protocol):
    """A run before it starts: its settings, its rows, and the runs that it starts from. No model is loaded."""

    @property
    def config(self) -> RunConfig:
        """Every setting."""

    @property
    def train_rows(self) -> Sequence[Located]:
        """The rows to train on."""

    @property
    def eval_rows(self) -> Sequence[Located]:
        """The held-out rows."""

    @property
    def parents(self) -> Mapping[str, Parent]:
        """Role -> the run that it starts from; a role that starts from the base model is not in it."""

    @property
    def limits(self) -> Limits:
        """The numbers of tokens, positions and layers of the base model; None if its files are not on this machine."""

    @property
    def registry(self) -> Any:
        """The active plugins and their components. Not stable."""


class Run(Protocol):
    """One run of one stage: its data and settings, and its models, loss, optimizer, reward and engine."""

    skipped: int  # bad rows that were left out
    policy_learns_from: int  # the step from which the policy has gradients; a stage with a warm-up sets it
    streamed_rows: int | None  # rows of the stream that were trained on; None before the end, and without a stream
    steps_between_checkpoints: int  # checkpoints are possible every so many steps; a stage may set it
    is_planned: bool  # for `alignkit plan`: tensors have no data, so no number means anything

    @property
    def config(self) -> RunConfig:
        """Every setting."""

    @property
    def train_rows(self) -> Sequence[Located]:
        """The rows to train on, of a type in ``Stage.rows``."""

    @property
    def stream(self) -> Any:
        """The rows to train on if they are read while training, else None. ``train_rows`` are the first of them."""

    @property
    def eval_rows(self) -> Sequence[Located]:
        """The held-out rows."""

    @property
    def base(self) -> str:
        """The folder or the hub id of the model that adapters sit on."""

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for it: those of the config, with the commit of a model of the hub."""

    @property
    def base_weights(self) -> str | None:
        """The fingerprint of its weights; None if its files are not on this machine."""

    @property
    def limits(self) -> Limits:
        """Its numbers of tokens, positions and layers."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a chat template and a pad token."""

    @property
    def stop_ids(self) -> list[int]:
        """The tokens at which an answer ends."""

    @property
    def score_pad_token_id(self) -> int | None:
        """The pad token of a model with a scalar head; None if the pad token also ends answers."""

    @property
    def parents(self) -> dict[str, Path]:
        """Role -> the folder of the run that it starts from."""

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """Role -> the manifest of that run."""

    def parent_rows(self, role: str) -> Sequence[Located]:
        """The rows that a parent was trained on; none if there is no parent or its data are gone."""

    def model(self, role: str, start: str = "policy") -> nn.Module:
        """The model of a role, made trainable by the tuner and started from the parent ``start``.

        A ``value`` or a ``reward`` has a scalar head. Fresh weights depend on ``train.seed`` alone.
        """

    def loss(self) -> Callable[[Any], LossOutput]:
        """The loss: a function of ``Stage.batch``. Its output is checked."""

    def training_arguments(self, cls: type[Args], **own: Any) -> Args:
        """``cls`` from the ``train`` table and ``own``, which wins. Other values are Transformers' defaults."""

    def optimizer(self, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """The optimizer's class (or factory) and arguments, for ``Trainer(optimizer_cls_and_kwargs=...)``."""

    def reward(self) -> RewardFunction:
        """The reward that ``Stage.uses`` names. With ``reward.on_error=skip`` the score of a refused answer is NaN."""

    def reward_run(self, path: str | None) -> RewardFunction:
        """The scores of the reward model in the run folder ``path``; None if ``Reward.needs`` names one run.

        Raises:
            ConfigError: ``Reward.needs`` did not name this run.
        """

    def rollout(self, sampling: Sampling) -> Engine:
        """The engine that ``Stage.uses`` names."""

    def callbacks(self) -> list[TrainerCallback]:
        """Progress, metrics, Ctrl-C, the state of the loss, and the callbacks of plugins."""

    @property
    def device(self) -> torch.device:
        """The device on which models compute."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which models compute."""

    @property
    def today(self) -> str:
        """The day on which the run began, for chat templates that write the date. A resume keeps it."""

    @property
    def processes(self) -> int:
        """The number of processes that train together, under torchrun or accelerate launch."""

    @property
    def folder(self) -> Path:
        """The folder of the unfinished run, while it trains; ``config.folder`` is that of the finished one."""

    def say(self, line: str, /) -> None:
        """Print a line for the user."""

    def surroundings(self) -> dict[str, Any]:
        """Fingerprints of what the outcome depends on beside the config."""

    @property
    def plan(self) -> Plan:
        """The plan that it was started from."""

    @property
    def registry(self) -> Any:
        """The active plugins and their components. Not stable."""


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    folder: Path  # the run folder
    metrics: dict[str, float]  # as in the manifest: `train_loss`, `eval_...`, `first_eval_...`
    seconds: float  # its duration
