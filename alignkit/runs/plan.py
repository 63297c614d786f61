"""What a command will do, resolved like make and checked before anything is loaded. No torch here.

A stage says which roles it needs and which stage makes them. A run folder that the config names is used; else the
newest finished run that matches; else the missing stage is trained first.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import data, paths
from alignkit.components import Component
from alignkit.config import RunConfig, identity, layers, resolve, reward_parts
from alignkit.data import Located, Rows, reading, sources
from alignkit.errors import ConfigError, DataError
from alignkit.registry import Registry, handover
from alignkit.registry.plugin import bare
from alignkit.runs import base, lineage, manifest
from alignkit.runs.lineage import Parent

BASE = "base"  # in place of a run folder: start from the bare model


@dataclass(frozen=True)
class Plan:
    """A run that can start: its config, its rows, what it goes on from, and where it goes."""

    registry: Registry
    config: RunConfig
    source: Rows
    train_rows: list[Located]
    eval_rows: list[Located]
    eval_source: Rows | None  # only where the config names one
    parents: dict[str, Parent] = field(default_factory=dict)  # by role; without those from the bare model

    def describe(self) -> list[tuple[str, str]]:
        """What a person wants to know before it starts, as (label, text)."""
        config, train = self.config, self.config.train
        learning_rate = train.get("learning_rate", 5e-5)
        steps = train.get("max_steps", -1)
        length = f"{steps} steps" if steps > 0 else _count(train.get("num_train_epochs", 3), "epoch")
        batch = train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)
        extent = self._in_words("extent", config.stage.config) or f"{length}, batches of {batch}"
        in_memory = self._in_words("in_memory", self)
        split = f"{len(self.eval_rows)} rows split off"
        return [
            ("stage", self._named("stage")),
            ("model", config.model),
            *(("plugin", line) for line in self._plugins()),
            *((f"{role} from", parent.describe()) for role, parent in self.parents.items()),
            ("tuner", self._named("tuner")),
            *([("in memory", in_memory)] if in_memory else []),
            ("loss", self._named("loss")),
            *((kind, self._named(kind)) for kind in config.stage.component.uses),
            ("optimizer", f"{self._named('optimizer')}, learning rate {learning_rate:g}"),
            ("data", self.source.describe()),
            ("held out", self.eval_source.describe() if self.eval_source else split),
            ("training", f"{len(self.train_rows)} rows, {extent}"),
            *(("not used", f"train.{key}: {instead}") for key, instead in config.unused.items()),
            ("run folder", str(config.folder)),
        ]

    def _plugins(self) -> Iterator[str]:
        """Each active plugin that is not built in, with all that it brings; what is picked of it stands at its kind."""
        for plugin in self.registry.active:
            if not plugin.builtin:
                gives = [f"{component.kind} {component.name}" for component in self.registry.given_by(plugin)]
                yield f"{plugin.name} ({plugin.provider}): {', '.join([*gives, *self.registry.run_hooks_of(plugin)])}"

    def _in_words(self, field: str, argument: Any) -> str:
        """What the stage says of itself; empty where it says nothing."""
        stage = self.config.stage.component
        say = getattr(stage, field)
        return handover.in_words(self.registry.who(stage, field), say(argument)) if say else ""

    def _named(self, kind: str) -> str:
        component = getattr(self.config, kind).component
        plugin = self.registry.provider(component)
        by = "" if plugin.builtin else f" ({plugin.provider})"
        return f"{component.name}: {component.summary}{by}"


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


@dataclass(frozen=True)
class Pipeline:
    """What a command will do: the runs to train, in order; the last is the one that was asked for."""

    to_train: list[Plan]
    found: list[Parent]  # finished runs that they go on from, or the one that was asked for, where it is there


def pipeline(registry: Registry, file: Mapping[str, Any], cli: Mapping[str, Any], overwrite: bool = False) -> Pipeline:
    """Resolve what was asked for, and every stage under it.

    ``file`` and ``cli`` are as in :func:`alignkit.config.resolve`; ``overwrite`` trains anew what was asked for.

    Raises:
        AlignkitError: whatever would stop one of the runs and can be known without torch.
    """
    planned = _Planner(registry, file, cli).plan(overwrite)
    _check_used(registry, cli, planned)
    return planned


def _check_used(registry: Registry, cli: Mapping[str, Any], planned: Pipeline) -> None:
    """Whether something is used of each plugin on the command line that has no component of its own name.

    Raises:
        ConfigError: nothing is; says what it gives. In a config file it may be for another command.
    """
    configs = [plan.config.to_dict() for plan in planned.to_train]
    used = _texts([cli, *configs, *(run.manifest["config"] for run in planned.found if run.manifest)])
    for name in layers.plugins(cli):
        for plugin in registry.meant(name):
            given = registry.given_by(plugin)
            names = {component.name for component in given}
            by_itself = registry.run_hooks_of(plugin) or any(component.kind == "format" for component in given)
            if bare(name) not in names and not names & used and not by_itself:
                gives = ", ".join(f"{component.kind} {component.name}" for component in given)
                pick = f": pick one, such as {given[0].kind}.name={given[0].name}" if given else ""
                raise ConfigError(f"{plugin}: nothing of it is used. It gives {gives or 'nothing'}{pick}")


def _texts(value: Any) -> set[str]:
    """Every text in nested tables and lists."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return set[str]().union(*map(_texts, inner))
    return {value} if isinstance(value, str) else set()


class _Planner:
    def __init__(self, registry: Registry, file: Mapping[str, Any], cli: Mapping[str, Any]) -> None:
        self.registry, self.file, self.cli = registry, file, cli
        self.result = Pipeline([], [])
        self.known: dict[str, Parent] = {}  # stage -> the run that gives it

    def plan(self, overwrite: bool) -> Pipeline:
        config, parents = self._with_parents(resolve(self.registry, self.file, self.cli))
        if manifest.is_run(config.folder) and not overwrite and is_made_by(config):
            done = Parent(config.stage.component.name, config.folder, manifest.read(config.folder))
            return Pipeline([], [done])
        self.result.to_train.append(make(self.registry, config, parents))
        return self.result

    def _with_parents(self, config: RunConfig) -> tuple[RunConfig, dict[str, Parent]]:
        """The config with its parents' folders, and with what it takes from them where the user said nothing."""
        stage = config.stage.component
        parents = {}
        for role, need in stage.needs.items():
            key = f"{stage.name}.{role}"
            if (said := config.parents[role]) != BASE:
                parents[role] = lineage.named(key, said, role) if said else self._find(need, key)
        if parents:
            inherited = lineage.inherited(next(iter(parents.values())))
            config = resolve(self.registry, self.file, self.cli, stage.name, inherited)
            folders = {role: str(parent.folder) for role, parent in parents.items()}
            config = dataclasses.replace(config, parents={**config.parents, **folders})
        for role, parent in parents.items():
            lineage.check(config, parent, f"{stage.name}.{role}")
        if config.reward is not None:
            config = self._with_reward_runs(config, parents)
        for parent in parents.values():
            if parent.manifest is not None and parent not in self.result.found:
                self.result.found.append(parent)
        return config, parents

    def _with_reward_runs(self, config: RunConfig, parents: dict[str, Parent]) -> RunConfig:
        """The config with the folders of the runs that its reward needs; they join ``parents``, each once."""

        def find(stage: str, role: str, named: str | None, key: str) -> str:
            run = lineage.named(key, named, role) if named else self._find(stage, key)
            if "policy" in parents:
                lineage.check_same_tokens(parents["policy"], run)
            else:
                lineage.check_same_tokens_as_base(config, run)
            if run.folder not in [parent.folder for parent in lineage.rewards_in(parents).values()]:
                others = sum(other.partition("_")[0] == role for other in parents)
                parents[f"{role}_{others + 1}" if others else role] = run
            return str(run.folder)

        assert config.reward is not None
        return dataclasses.replace(config, reward=reward_parts.with_runs(self.registry, config.reward, find))

    def _find(self, stage_name: str, key: str) -> Parent:
        """The newest finished run of a stage that matches what the user said of it, or one that is trained first."""
        if stage_name not in self.known:
            config = resolve(self.registry, self.file, self.cli, stage_name, there=True)
            fingerprint = sources.fingerprint(config.data)
            runs = lineage.finished(Path(config.output), stage_name)
            matching = [run for run in runs if not lineage.differences(run, config, fingerprint)]
            if not matching and manifest.is_run(config.folder):
                there = next((run for run in runs if run.folder == config.folder), None)
                if there is None:
                    raise ConfigError(f"{config.folder} is there and is of another stage: choose another --output")
                why = lineage.differences(there, config, fingerprint)
                longer = {
                    str(change)
                    for change in identity.changes(manifest.read(there.folder)["config"], config)
                    if change.grows
                }
                resume = f"train it on with alignkit train --plugin {stage_name} --resume, "
                raise ConfigError(
                    f"{config.folder} is there but is not what these settings make: {'; '.join(why)}. Use it all the "
                    f"same with {key}={config.folder}, {resume if longer.issuperset(why) else ''}train it anew with "
                    f"alignkit train --plugin {stage_name} --overwrite, or choose another --output"
                )
            if not matching:
                config, parents = self._with_parents(resolve(self.registry, self.file, self.cli, stage_name))
                self.result.to_train.append(make(self.registry, config, parents))
            self.known[stage_name] = matching[0] if matching else Parent(stage_name, config.folder, None, config)
        return self.known[stage_name]


def make(registry: Registry, config: RunConfig, parents: Mapping[str, Parent] | None = None) -> Plan:
    """Check everything about one run that can be checked without torch, and read the data.

    Raises:
        ConfigError: a package that a component needs is not installed; the base is none.
        DataError: from :mod:`alignkit.data`.
    """
    parents = dict(parents or {})
    chosen = [config.stage, config.tuner, config.optimizer, config.loss]
    chosen += [getattr(config, kind) for kind in config.stage.component.uses if kind != "reward"]
    chosen += reward_parts.with_parts(registry, config.reward) if config.reward else []
    for component, settings in chosen:
        check_requires(registry, component)
        if component.check:
            component.check(settings)
    for parent in parents.values():  # a reward run may be of another tuner
        tuner = parent.manifest["tuner"] if parent.manifest else config.tuner.component.name
        if registry.has("tuner", tuner):
            check_requires(registry, registry.get("tuner", tuner))
    if config.chat_template is not None and not paths.expand(config.chat_template).is_file():
        raise ConfigError(f"chat_template: no file {config.chat_template}")
    base.check(config.model)
    base.check_trainable(config.model, config.tuner.component)
    tuner, stage = config.tuner.component, config.stage.component
    if tuner.trains not in stage.trains:
        raise ConfigError(
            f"stage '{stage.name}' cannot use tuner '{tuner.name}', which trains {tuner.trains}: choose one that "
            f"trains {' or '.join(stage.trains)}"
        )

    stage = config.stage.component
    if config.data.path is None:
        raise ConfigError(f"stage '{stage.name}' brings no data of its own: add --data")
    for split, path in ((config.data.split, config.data.path), (config.data.eval_split, config.data.eval_path)):
        if split not in (None, "train") and path is not None and sources.is_file(path):
            raise ConfigError(
                f"data: {path} is one file and has no split '{split}'; folders and hub data sets have splits"
            )
    source = data.load(registry, config.data, config.data.path, stage.rows)
    if config.data.eval_path is not None:
        held_out = dataclasses.replace(config.data, split=config.data.eval_split or config.data.split)
        if config.data.eval_path == config.data.path and held_out.split == config.data.split:
            raise ConfigError(f"data.eval_path is the training data ({config.data.path}): name data.eval_split too")
        eval_source = data.load(registry, held_out, config.data.eval_path, stage.rows)
        return _without_bad_rows(Plan(registry, config, source, source.rows, eval_source.rows, eval_source, parents))
    train_rows, eval_rows = reading.hold_out(source.rows, config.data.eval_size, config.data.seed)
    return _without_bad_rows(Plan(registry, config, source, train_rows, eval_rows, None, parents))


def _without_bad_rows(plan: Plan) -> Plan:
    """The plan without the rows that the chat template refuses, where ``data.on_bad_row`` skips them.

    They leave after the split, so that which rows are held out is a matter of the data and the seed alone.

    Raises:
        DataError: the template refuses a row, and bad rows are errors.
    """
    from alignkit.runs import preview  # here: `--help` does without Jinja

    policy = plan.parents.get("policy")
    folder = policy.folder if policy and policy.manifest else preview.folder_of(plan.config)
    sides = {"train_rows": plan.train_rows, "eval_rows": plan.eval_rows}
    tokenizer = preview.Tokenizer.read(folder, plan.config.chat_template) if folder else None
    if folder is None or tokenizer is None:
        return plan
    bad = {name: preview.bad_rows(plan.config, folder, tokenizer, rows) for name, rows in sides.items()}
    reasons = [reason for found in bad.values() for reason in found.values()]
    if not reasons:
        return plan
    if plan.config.data.on_bad_row == "error":
        raise DataError(reasons[0])
    train_rows, eval_rows = ([row for row in rows if row.where not in bad[name]] for name, rows in sides.items())
    for name, what, kept in (("train_rows", "train on", train_rows), ("eval_rows", "hold out", eval_rows)):
        if sides[name] and not kept:
            first = next(iter(bad[name].values()))
            raise DataError(f"all {len(sides[name])} rows to {what} are bad, the first: {first}")
    skipped = [*plan.source.skipped, *reasons]
    source = dataclasses.replace(plan.source, skipped=skipped)
    return dataclasses.replace(plan, source=source, train_rows=train_rows, eval_rows=eval_rows)


def check_requires(registry: Registry, component: Component) -> None:
    """Whether the packages that a component needs are installed.

    Raises:
        ConfigError: one is not.
    """
    for package in component.requires:
        try:
            there = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # a submodule of what is not installed
            there = False
        if not there:
            what = f"{registry.who(component)} needs {package}, which is not installed"
            raise ConfigError(f"{what}: pip install {package.partition('.')[0]}")


def is_made_by(config: RunConfig) -> bool:
    """Whether ``config`` makes the finished run that is in its folder: the same settings, from the same data."""
    record = manifest.read(config.folder)
    if any(change.resume != "may_change" for change in identity.changes(record["config"], config)):
        return False
    run = Parent(record["stage"], config.folder, record)
    return not lineage.differences(run, config, sources.fingerprint(config.data))
