"""Components: the named objects that plugins declare. They are frozen and keyword-only.

Every component has its own config: a dataclass whose fields are the component's table in the config file. The functions
of a component import torch inside, so that declaring it is cheap. Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignkit.rows import Row

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from alignkit.batches import LossOutput, Question
    from alignkit.protocols import Plan, Run

    OptimizerClass = type[TorchOptimizer] | Callable[[], Callable[..., TorchOptimizer]]


Resume = Literal["same", "may_change", "may_grow"]


def option(
    default: Any,
    help: str,
    *,
    resume: Resume | Callable[[Any], Resume] = "same",
    only_with: str | None = None,
    needs_trust: str | None = None,
) -> Any:
    """A field of a config dataclass: its default, and the help text that ``alignkit config`` writes next to it.

    ``resume`` is what ``--resume`` accepts, or a function of the config that returns it:

    - ``"same"``: no other value. The setting affects the result.
    - ``"may_change"``: any value. The setting does not affect the result: an address, a timeout, a batch size in
      memory. A finished run that differs only in such settings is the same run.
    - ``"may_grow"``: a larger value, or None if None means no limit. The setting determines when training stops; a
      larger value extends a finished run.

    ``only_with`` names another setting of the same table, as ``"key"`` or ``"key=value"``, without which this one has
    no effect. Any value other than the default is then an error.

    ``needs_trust`` says what a value other than the default makes alignkit do: ``"runs this code"``. A config file or
    a run folder may come from someone else, so there the setting needs ``--trust`` (see :mod:`alignkit.config.trust`).
    """
    metadata = {"help": help, "resume": resume, "only_with": only_with, "needs_trust": needs_trust}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class NoConfig:
    """The config of a component without settings."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """The fields of every component."""

    kind: ClassVar[str]

    name: str  # on the command line and in config files
    summary: str  # one line for `alignkit plugins`
    config: type = NoConfig  # a dataclass whose fields are made with `option`
    requires: tuple[str, ...] = ()  # import names of packages that it needs and alignkit does not depend on
    # called before a model is loaded with its config, and, if it has a parameter `plan`, with the plan (None outside
    # training); raises ConfigError
    check: Callable[..., None] | None = None
    # its config -> settings of its table that take less memory, one at a time, in the order in which
    # `alignkit plan --fit` tries them; {"name": ...} selects another component
    less_memory: Callable[[Any], Iterable[Mapping[str, Any]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Stage(Component):
    """A kind of training."""

    kind: ClassVar[str] = "stage"

    build: Callable[[Run], Trainer]  # creates the transformers.Trainer
    rows: tuple[type[Row], ...]  # the types of rows that it trains on
    batch: type  # the input of its loss, such as one of alignkit.batches
    loss: str  # its default loss
    data: str | None = None  # its default data
    data_of: str | None = None  # a stage with the same kind of data; its data are the default if a config names them
    role: str = "policy"  # the role of the model that it trains
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # role it starts from -> stage that trains it
    uses: Mapping[str, str] = dataclasses.field(default_factory=dict)  # "reward", "rollout" -> its default component
    finish: Callable[[Run, Trainer], dict[str, Any] | None] | None = None  # after training; joins the manifest
    extent: Callable[[Any], str] | None = None  # its config -> the amount of training, as text; else epochs and batches
    in_memory: Callable[[Plan], str] | None = None  # the models in memory, as text; for stages with several
    # the plan of the run, a short run of it and its trainer -> the seconds of each part of the whole run, at least and
    # at most; None: two microbatches of the trainer's data loader are measured
    calibrate: Callable[[Plan, Run, Trainer], Mapping[str, tuple[float, float]]] | None = None
    note: Callable[[Plan], str] | None = None  # what to know about the data, as text for the plan; "": nothing
    trains: tuple[str, ...] = ("weights",)  # the kinds of tuners that it supports, see `Tuner.trains`
    shards: bool = False  # its trainer works on models that are spread over processes, see `train.shard`
    watch: tuple[str, ...] = ()  # held-out metrics in progress lines; "x_error" is shown as the error of "x"
    streams: bool = False  # whether it can read its rows while it trains (`data.streaming`)
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its defaults for TrainingArguments
    resume: Mapping[str, Resume] = dataclasses.field(default_factory=dict)  # keys of `train`, as in `option`
    # keys of `train`, or "key=value", that have no effect in it -> what to set instead
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tuner(Component):
    """Makes a model trainable."""

    kind: ClassVar[str] = "tuner"

    load: Callable[[Any, torch.dtype], dict[str, Any]]  # its config, the run's dtype -> arguments of `from_pretrained`
    wrap: Callable[[Any, PreTrainedModel, str], nn.Module]  # its config, the loaded model, its role -> the module
    adapters: bool = False  # the base stays unchanged, so that several roles can share it
    trains: Literal["weights", "inputs"] = "weights"  # in layers, or before the prompt (prompt and prefix tuning)
    lr_scale: float = 1.0  # multiplies a stage's default learning rate


@dataclass(frozen=True, kw_only=True)
class Loss(Component):
    """A function of a batch of tensors."""

    kind: ClassVar[str] = "loss"

    batch: type  # its input, such as one of alignkit.batches; it fits every stage with this batch type
    build: Callable[[Any], Callable[[Any], LossOutput]]  # its config -> the function
    needs_reference: bool = True  # False: stages such as `dpo` build no reference model
    compares_rows: bool = False  # True: the loss of a row depends on the other rows of its microbatch


@dataclass(frozen=True, kw_only=True)
class Optimizer(Component):
    """An optimizer class and its arguments; ``transformers.Trainer`` creates the parameter groups.

    An optimizer that depends on the layer of a parameter returns a factory in place of the class: called without
    arguments, it returns a function of the model and the optimizer's arguments that creates the optimizer.
    """

    kind: ClassVar[str] = "optimizer"

    build: Callable[[Any, TrainingArguments], tuple[OptimizerClass, dict[str, Any]]]
    lr_scale: float = 1.0  # multiplies a stage's default learning rate, which is for AdamW
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)  # keys of `train` without effect -> why


@dataclass(frozen=True, kw_only=True)
class DataFormat(Component):
    """A format of rows in a file."""

    kind: ClassVar[str] = "format"

    fits: Callable[[Mapping[str, Any]], int]  # raw row -> how many of its fields it reads; 0: not in this format
    # the raw row, and the format's config if it has one -> a row, or a list of rows, which may be empty.
    # A pure function; raises DataError for a bad row
    convert: Callable[..., Row | list[Row]]
    # the types of rows that it makes: a stage that trains on none of them does not detect it; (): any
    rows: tuple[type[Row], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reward(Component):
    """Scores answers."""

    kind: ClassVar[str] = "reward"

    # its config, the run -> a function of Answers, and of the stage's `roles` if it has that parameter, that returns a
    # score for each answer
    build: Callable[[Any, Run], Callable[..., Sequence[float]]]
    # its config -> {"reward": the stage that trains it}; `path` (or `paths`) in the config is the folder of that run
    needs: Callable[[Any], Mapping[str, str]] = lambda config: {}
    fields: tuple[str, ...] = ()  # what it reads from the rows of prompts, in `Answers.fields`
    parts: str | None = None  # the field of its config with other rewards: a table with a name, or a list of tables
    part_keys: tuple[str, ...] = ()  # keys of such a table that belong to this reward, such as a weight
    judge: str | None = None  # the field of its config with the judge that it asks: a table with a name

    def __post_init__(self) -> None:
        if dataclasses.is_dataclass(self.config) and "on_error" not in self.config.__dataclass_fields__:
            object.__setattr__(self, "config", _with_on_error(self.config))


def _with_on_error(config: type) -> type:
    """The config of a reward with the setting ``on_error``, which every reward has."""
    help = "an answer for which the reward fails or is NaN: stop the run, or leave the answer out of the update"
    field = ("on_error", Literal["stop", "skip"], option("stop", help, resume="may_change"))
    frozen = config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    own = {"__module__": config.__module__, "__doc__": config.__doc__}
    return dataclasses.make_dataclass(config.__name__, [field], bases=(config,), frozen=frozen, namespace=own)


@dataclass(frozen=True, kw_only=True)
class Judge(Component):
    """Ranks answers to the same prompt.

    alignkit asks for both orders of a pair, makes ranks of the verdicts, and keeps them: see ``alignkit.judging``.
    """

    kind: ClassVar[str] = "judge"

    # its config, the run -> a function of questions that returns, or yields one by one, the ranks of the answers of
    # each (lower is better, equal ranks are a tie), or None where it has no verdict: a refusal, an unreadable reply
    build: Callable[[Any, Run], Callable[[Sequence[Question]], Iterable[Sequence[float] | None]]]
    largest: Callable[[Any], int | None] = lambda config: 2  # its config -> answers in one question; None: any number
    order_matters: bool = True  # False: it scores each answer by itself, so each question is asked in one order only
    graded: bool = False  # True: it returns a cost of each answer, any number; those of both orders are added
    needs: Callable[[Any], Mapping[str, str]] = lambda config: {}  # as in `Reward`
    # its config -> what its verdicts depend on beside the question, the key under which they are stored; None: they are
    # not stored. Default: its settings with resume="same"
    identity: Callable[[Any], str | None] | None = None
    tokens: Callable[[Any, Question], int] | None = None  # its config, a question -> tokens sent to ask it, if it costs


@dataclass(frozen=True, kw_only=True)
class Rollout(Component):
    """An engine that samples answers from the policy."""

    kind: ClassVar[str] = "rollout"

    # its config, the tokenizer, the Sampling, and `run` if it has that parameter -> the engine: a function of the
    # policy, the prompts, and `roles` if it has that parameter, that returns the answers; both are token ids
    build: Callable[..., Callable[..., list[list[int]]]]
    in_other_process: bool = False  # it samples in another process, such as a server, and takes no memory of this one


KINDS: dict[str, type[Component]] = {
    c.kind: c for c in (Stage, Tuner, Loss, Optimizer, DataFormat, Reward, Judge, Rollout)
}


def halvings(key: str, value: int, smallest: int, **more: Any) -> list[dict[str, Any]]:
    """Settings for ``less_memory``: half of ``value``, a quarter, and so on, not below ``smallest``, with ``more``."""
    return [{key: value >> n, **more} for n in range(1, value.bit_length()) if value >> n >= smallest]


def fields_of(*names: str) -> Callable[[Mapping[str, Any]], int]:
    """A ``fits`` for formats that are recognized by their fields: all of ``names`` are present and not null."""

    def fits(row: Mapping[str, Any]) -> int:
        return len(names) if all(row.get(name) is not None for name in names) else 0

    return fits
