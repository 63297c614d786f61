"""Components: the named things that plugins declare. Frozen, keyword-only, and free of torch.

Every component owns its config: a dataclass whose fields are the component's table in the config file. Whatever needs
torch is imported inside the functions that a component carries, so that declaring costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignkit.rows import Row

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from alignkit.batches import LossOutput
    from alignkit.protocols import Plan, Run

    OptimizerClass = type[TorchOptimizer] | Callable[[], Callable[..., TorchOptimizer]]


Resume = Literal["same", "may_change", "may_grow"]


def option(
    default: Any, help: str, *, resume: Resume | Callable[[Any], Resume] = "same", only_with: str | None = None
) -> Any:
    """A field of a config dataclass: its default, and the comment that ``alignkit config`` writes beside it.

    ``resume`` says whether ``--resume`` accepts another value, or is a function of the config that says so:

    - ``"same"``: no. The setting decides what is trained.
    - ``"may_change"``: yes. It decides nothing of what is trained: an address, a time-out, how much is in memory. A
      finished run that differs only in such settings is the same run.
    - ``"may_grow"``: a larger value, or none where none means no limit. It decides when training stops, and a finished
      run can be trained on with it.

    ``only_with`` names another setting of the same table without which this one has no effect, as ``"key"`` or
    ``"key=value"``. Another value than the default is then an error.
    """
    metadata = {"help": help, "resume": resume, "only_with": only_with}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class NoConfig:
    """The config of a component that has nothing to set."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """What every kind of component has."""

    kind: ClassVar[str]

    name: str  # how the command line and the config file call it
    summary: str  # one line for `alignkit plugins`
    config: type = NoConfig  # a dataclass, its fields made with `option`
    requires: tuple[str, ...] = ()  # import names of packages that alignkit itself does not depend on
    check: Callable[[Any], None] | None = None  # of its config, before anything is loaded: raises ConfigError


@dataclass(frozen=True, kw_only=True)
class Stage(Component):
    """One kind of training."""

    kind: ClassVar[str] = "stage"

    build: Callable[[Run], Trainer]  # a transformers.Trainer, ready to train
    rows: tuple[type[Row], ...]  # the rows it trains on
    batch: type  # what its loss takes, from alignkit.batches
    loss: str  # the loss it uses unless another is named
    data: str | None = None  # the bundled data set it trains on unless another is named
    data_of: str | None = None  # a stage on the same rows, whose data in a config are its own where it has none
    role: str = "policy"  # what the model that it makes is for
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # role it starts from -> the stage that makes it
    uses: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # "reward", "rollout" -> the one it uses by default
    finish: Callable[[Run, Trainer], dict[str, Any] | None] | None = None  # after training; joins the manifest
    extent: Callable[[Any], str] | None = None  # its config -> how much it trains, in words; else epochs and batches
    in_memory: Callable[[Plan], str] | None = None  # which models it holds, in words; where that is more than one
    trains: tuple[str, ...] = ("weights",)  # what a tuner may train here, see `Tuner.trains`
    watch: tuple[str, ...] = ()  # held-out metrics that progress lines show; "x_error" is shown as the error of "x"
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its defaults over TrainingArguments
    resume: Mapping[str, Resume] = dataclasses.field(default_factory=dict)  # keys of `train`, as in `option`
    refuses: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # a key of `train` that has no effect in it, or "key=value" -> what to set instead


@dataclass(frozen=True, kw_only=True)
class Tuner(Component):
    """How a model is made trainable."""

    kind: ClassVar[str] = "tuner"

    load: Callable[[Any, torch.dtype], dict[str, Any]]  # its config, the run's dtype -> arguments of `from_pretrained`
    wrap: Callable[[Any, PreTrainedModel, str], nn.Module]  # its config, the loaded model, its role -> what is trained
    adapters: bool = False  # what it trains sits on a base that stays as it is and may serve several roles
    trains: Literal["weights", "inputs"] = "weights"  # in layers, or before the prompt (prompt and prefix tuning)
    lr_scale: float = 1.0  # a stage's default learning rate times this is the default under this tuner


@dataclass(frozen=True, kw_only=True)
class Loss(Component):
    """A pure function of tensors."""

    kind: ClassVar[str] = "loss"

    batch: type  # what it takes, from alignkit.batches; it fits every stage that gives this
    build: Callable[[Any], Callable[[Any], LossOutput]]  # its config -> the function
    needs_reference: bool = True  # False: no reference model is built for it (DPO-like stages)


@dataclass(frozen=True, kw_only=True)
class Optimizer(Component):
    """An optimizer class and its arguments; `transformers.Trainer` makes the parameter groups.

    An optimizer that must know which layer a parameter is of gives, in place of the class, a factory: called with
    nothing, it gives a function of the model and the arguments, which makes the optimizer.
    """

    kind: ClassVar[str] = "optimizer"

    build: Callable[[Any, TrainingArguments], tuple[OptimizerClass, dict[str, Any]]]
    lr_scale: float = 1.0  # as a tuner's, for an optimizer that wants other rates than AdamW; the two multiply
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a key of `train` that has no effect -> why


@dataclass(frozen=True, kw_only=True)
class DataFormat(Component):
    """A way in which rows are written."""

    kind: ClassVar[str] = "format"

    fits: Callable[[Mapping[str, Any]], int]  # how many fields of the row it reads; 0: the row is not in this format
    # the raw row, and the format's config where it has one -> what the row means, or a list of several rows or none;
    # pure; raises DataError saying what is missing
    convert: Callable[..., Row | list[Row]]


@dataclass(frozen=True, kw_only=True)
class Reward(Component):
    """Scores answers."""

    kind: ClassVar[str] = "reward"

    # its config, the run -> a function of Answers, and of the stage's `roles` if it has that parameter
    build: Callable[[Any, Run], Callable[..., Sequence[float]]]
    # its config -> {"reward": stage that makes it}; the config's `path` names the run, its `paths` a list of several
    needs: Callable[[Any], Mapping[str, str]] = lambda config: {}
    parts: str | None = None  # the field of its config that holds other rewards: a table with a name, or a list of them
    part_keys: tuple[str, ...] = ()  # the keys of such a table that are its own, such as a weight

    def __post_init__(self) -> None:
        if dataclasses.is_dataclass(self.config) and "on_error" not in self.config.__dataclass_fields__:
            object.__setattr__(self, "config", _with_on_error(self.config))


def _with_on_error(config: type) -> type:
    """The config of a reward with the key that every reward has."""
    help = "an answer for which the reward fails or is NaN: stop the run, or leave the answer out of the update"
    field = ("on_error", Literal["stop", "skip"], option("stop", help, resume="may_change"))
    frozen = config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    own = {"__module__": config.__module__, "__doc__": config.__doc__}
    return dataclasses.make_dataclass(config.__name__, [field], bases=(config,), frozen=frozen, namespace=own)


@dataclass(frozen=True, kw_only=True)
class Rollout(Component):
    """Samples answers from the policy."""

    kind: ClassVar[str] = "rollout"

    # its config, the tokenizer, the Sampling, and `run` if it has that parameter -> a function of the policy, the
    # prompts' token ids, and `roles` if it has that parameter: the answers' token ids, `samples` per prompt in turn
    build: Callable[..., Callable[..., list[list[int]]]]


KINDS: dict[str, type[Component]] = {c.kind: c for c in (Stage, Tuner, Loss, Optimizer, DataFormat, Reward, Rollout)}


def fields_of(*names: str) -> Callable[[Mapping[str, Any]], int]:
    """A ``fits`` for formats that are told by their fields: all of ``names`` present and not null."""

    def fits(row: Mapping[str, Any]) -> int:
        return len(names) if all(row.get(name) is not None for name in names) else 0

    return fits
