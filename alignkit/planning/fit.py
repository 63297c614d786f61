"""Finds settings with which the runs of a command fit into a memory: ``alignkit plan --fit 12GB``.

Settings that do not change the result come first, then those that change the arithmetic of the optimizer, then those
that change what is trained. A component declares its own with ``less_memory``; those of the ``train`` table are here.
Importing this module imports no torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignkit.config import resume_rules
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.errors import AlignkitError, ConfigError
from alignkit.registry import Registry, checks
from alignkit.runs import plan as planner
from alignkit.runs.plan import Pipeline, Plan

GIB = 2**30
NONE, OPTIMIZER, RESULT = range(3)  # what a setting changes, in the order in which they are tried


@dataclass(frozen=True, eq=False)
class Option:
    """A setting to save memory with: its values from the mildest, each as keys of one table."""

    stage: str | None  # None: every stage of the command
    table: str  # its prefix on the command line, such as "ppo.train."
    values: Sequence[Mapping[str, Any]]
    help: Sequence[str]  # of each value

    def overrides(self, value: int) -> list[str]:
        """A value as settings of the command line."""
        return [f"{self.table}{key}={_text(setting)}" for key, setting in self.values[value].items()]


Chosen = Mapping[Option, int]  # option -> which of its values


class Setting(NamedTuple):
    """A setting of a fit, as on the command line."""

    override: str
    changes: int  # NONE, OPTIMIZER or RESULT
    help: str


class Fit(NamedTuple):
    """The settings that make the runs of a command fit; none if they fit as they are."""

    settings: list[Setting]
    pipeline: Pipeline  # with these settings
    peaks: Mapping[str, int]  # bytes by stage


def parse_size(text: str) -> int:
    """A size such as ``12GB``, ``12GiB`` or ``16000MB`` in bytes.

    Raises:
        ConfigError: it is not a size, or has no unit.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0 or text.strip()[-1:] not in ("b", "B") or "bit" in text.lower():
        raise ConfigError(f"'{text}' is not a size. Write a number and a unit, such as 12GB, 12GiB or 16000MB")
    return size


def fit(
    registry: Registry,
    file: Mapping[str, Any],
    cli: Mapping[str, Any],
    limit: int,
    peak: Callable[[Plan], int],
    trusted: bool = False,
) -> Fit:
    """Settings with which no run of a command takes more than ``limit`` bytes.

    The other arguments are those of :func:`alignkit.runs.plan.pipeline`; ``peak`` gives the bytes of a
    plan. As few settings as possible are changed, each as little as possible.

    Raises:
        ConfigError: no settings fit.
        AlignkitError: the command itself is not valid.
    """
    trials = _Trials(registry, file, cli, limit, peak, trusted)
    options = sorted(_options(trials.pipeline({}).to_train), key=trials.rank)
    chosen = dict[Option, int]()
    for option in options:
        if trials.fits(chosen):
            break
        if (value := trials.strongest(chosen, option)) is not None:
            chosen[option] = value
    if not trials.fits(chosen):
        peaks = trials.peaks(chosen)
        stage = max(peaks, key=lambda name: peaks[name])
        raise ConfigError(
            f"no settings fit into {limit / GIB:.2f} GiB: the smallest peak is {peaks[stage] / GIB:.2f} GiB, of {stage}"
        )
    for option in reversed(list(chosen)):
        chosen = trials.mildest(chosen, option)
    settings = [
        Setting(override, trials.changes(option, value), option.help[value])
        for option, value in chosen.items()
        for override in option.overrides(value)
    ]
    return Fit(settings, trials.pipeline(chosen), trials.peaks(chosen))


class _Trials:
    """Plans the command with other settings, and keeps what was computed."""

    def __init__(
        self,
        registry: Registry,
        file: Mapping[str, Any],
        cli: Mapping[str, Any],
        limit: int,
        peak: Callable[[Plan], int],
        trusted: bool,
    ) -> None:
        self.registry, self.file, self.cli, self.limit, self.peak = registry, file, cli, limit, peak
        self.trusted = trusted
        self.planned: dict[tuple[str, ...], Pipeline | AlignkitError] = {}
        self.bytes: dict[str, int] = {}  # of a plan, by its config

    def pipeline(self, chosen: Chosen) -> Pipeline:
        """The plans with these settings.

        Raises:
            AlignkitError: the settings are not valid.
        """
        overrides = _overrides(chosen)
        if overrides not in self.planned:
            cli = merge(self.cli, *map(parse_override, overrides))
            try:
                planned = planner.pipeline(self.registry, self.file, cli, overwrite=True, trusted=self.trusted)
                self.planned[overrides] = planned
            except AlignkitError as error:
                self.planned[overrides] = error
        if isinstance(result := self.planned[overrides], Pipeline):
            return result
        raise result

    def peaks(self, chosen: Chosen) -> dict[str, int]:
        """The bytes that each run takes with these settings, by stage."""
        peaks = {}
        for plan in self.pipeline(chosen).to_train:
            key = json.dumps({**plan.config.to_dict(), "output": None}, sort_keys=True, default=str)
            if key not in self.bytes:
                self.bytes[key] = self.peak(plan)
            peaks[plan.config.stage.component.name] = self.bytes[key]
        return peaks

    def is_valid(self, chosen: Chosen) -> bool:
        """Whether the command is valid with these settings."""
        try:
            self.pipeline(chosen)
        except AlignkitError:
            return False
        return True

    def fits(self, chosen: Chosen) -> bool:
        """Whether the command is valid with these settings, and every run fits."""
        return self.is_valid(chosen) and max(self.peaks(chosen).values(), default=0) <= self.limit

    def strongest(self, chosen: Chosen, option: Option) -> int | None:
        """The strongest valid value of an option; None if its stage fits already or no value takes less memory."""
        before = self.peaks(chosen)
        concerned = [option.stage] if option.stage else list(before)
        if all(before[stage] <= self.limit for stage in concerned):
            return None
        for value in reversed(range(len(option.values))):
            if self.is_valid({**chosen, option: value}):
                after = self.peaks({**chosen, option: value})
                return value if all(after[stage] <= before[stage] for stage in concerned) else None
        return None

    def mildest(self, chosen: Chosen, option: Option) -> dict[Option, int]:
        """The settings that fit with the mildest value of an option, or without it."""

        def changed(value: int) -> dict[Option, int]:
            values = {**chosen, option: value}  # in the same order
            return {each: of for each, of in values.items() if of >= 0}

        lowest, fitting = -1, chosen[option]
        while lowest < fitting:
            middle = (lowest + fitting) // 2
            if self.fits(changed(middle)):
                fitting = middle
            else:
                lowest = middle + 1
        return changed(fitting)

    def changes(self, option: Option, value: int) -> int:
        """The effect of a value of an option: NONE if ``--resume`` accepts it as a setting without effect."""
        before, after = (
            {plan.config.stage.component.name: plan.config for plan in self.pipeline(chosen).to_train}
            for chosen in ({}, {option: value})
        )
        stages = [option.stage] if option.stage else list(before)
        differences = [resume_rules.changes(before[stage].to_dict(), after[stage]) for stage in stages]
        if all(change.resume == "may_change" for change in itertools.chain(*differences)):
            return NONE
        return OPTIMIZER if option.table.endswith("optimizer.") else RESULT

    def rank(self, option: Option) -> tuple[int, int]:
        """The place of an option among the others: by what it changes, from how a run computes to how much it reads."""
        valid = next((value for value in range(len(option.values)) if self.is_valid({option: value})), None)
        if valid is None:
            return RESULT + 1, 0
        settings = option.values[valid]
        kinds = [type(setting) for key, setting in settings.items() if key != "name"]
        order = 1 if "name" in settings else 0 if bool in kinds else 3 if int in kinds else 2
        changes = self.changes(option, valid)
        return changes, order if changes == RESULT else 0


def _overrides(chosen: Chosen) -> tuple[str, ...]:
    """The settings as on the command line. Another component replaces settings of the one before."""
    replaced = {option.table for option, value in chosen.items() if "name" in option.values[value]}
    kept = [(o, v) for o, v in chosen.items() if o.table not in replaced or "name" in o.values[v]]
    return tuple(itertools.chain(*(option.overrides(value) for option, value in kept)))


def _text(setting: Any) -> str:
    return setting if isinstance(setting, str) else json.dumps(setting)


# --- the options of a command ----------------------------------------------------------------------------------------


def _options(plans: Sequence[Plan]) -> Iterator[Option]:
    for plan in plans:
        stage = plan.config.stage.component.name
        yield from _of_train(plan, stage)
        for kind in ("stage", "loss", *plan.config.stage.component.uses, "optimizer"):
            yield from _of_component(plan, kind, stage, f"{stage}." if kind == "stage" else f"{stage}.{kind}.")
    if len(plans) == 1:
        yield from _of_component(plans[0], "tuner", stage, f"{stage}.tuner.")
    elif plans:  # stages that start from each other have one tuner
        yield from _of_component(plans[-1], "tuner", None, "tuner.")


def _of_train(plan: Plan, stage: str) -> Iterator[Option]:
    """Smaller microbatches of the same optimizer step, smaller batches of evaluation, and gradient checkpointing."""
    train, table, refused = plan.config.train, f"{stage}.train.", plan.config.stage.component.refuses
    batch, accumulated = (train.get("per_device_train_batch_size", 8), train.get("gradient_accumulation_steps", 1))
    accumulates = "gradient_accumulation_steps" not in refused
    sizes = [
        {"per_device_train_batch_size": size}
        | ({"gradient_accumulation_steps": accumulated * batch // size} if accumulates else {})
        for size in range(batch - 1, 0, -1)
        if batch % size == 0
    ]
    yield Option(stage, table, sizes, ["rows per forward pass, of the same optimizer step"] * len(sizes))
    batch = train.get("per_device_eval_batch_size", 8)
    sizes = [{"per_device_eval_batch_size": size} for size in range(batch - 1, 0, -1) if batch % size == 0]
    yield Option(stage, table, sizes, ["rows per forward pass without gradients"] * len(sizes))
    if not train.get("gradient_checkpointing") and "gradient_checkpointing" not in refused:
        yield Option(stage, table, [{"gradient_checkpointing": True}], ["recompute activations in the backward pass"])


def _of_component(plan: Plan, kind: str, stage: str | None, table: str) -> Iterator[Option]:
    """The options that a component declares: consecutive settings of the same keys are the values of one option."""
    component, config = getattr(plan.config, kind)
    if component.less_memory is None:
        return
    declared = checks.tables(plan.registry.describe(component, "less_memory"), component.less_memory(config))
    fields = getattr(component.config, "__dataclass_fields__", {})
    for keys, values in itertools.groupby(declared, key=tuple):
        settings = list(values)
        texts = [
            plan.registry.get(kind, each["name"]).summary if "name" in each else fields[keys[0]].metadata["help"]
            for each in settings
        ]
        yield Option(stage, table, settings, texts)
