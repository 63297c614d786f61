"""Plans what a command will do, and checks it before anything is loaded. Imports no torch.

A stage declares the roles that it needs and the stages that train them. For each role, the plan uses the run folder in
the config, or the newest finished run that matches, or trains the missing stage first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import bundled, data, paths
from alignkit.config import model_kwargs, resolve, resume_rules, reward_parts, trust
from alignkit.config.resolve import RunConfig
from alignkit.config.settings import merge
from alignkit.data import held_out, sources
from alignkit.data.reading import Rows
from alignkit.data.spool import selected
from alignkit.data.streaming import RowStream
from alignkit.errors import ConfigError, DataError
from alignkit.protocols import Limits
from alignkit.registry import Registry, checks
from alignkit.rows import Located
from alignkit.runs import base, lineage, manifest, recorded, streamed, used_plugins
from alignkit.runs.lineage import BASE, Parent
from alignkit.runs.up_to_date import differences, is_made_by


@dataclass(frozen=True)
class Plan:
    """A run that can start: its config, its rows, and the runs that it starts from."""

    registry: Registry
    config: RunConfig
    source: Rows
    train_rows: Sequence[Located]
    eval_rows: Sequence[Located]
    eval_source: Rows | None  # None if held-out rows are split off the training data
    parents: dict[str, Parent] = field(default_factory=dict)  # by role, without those that start from the base model
    stream: RowStream | None = None  # with `data.streaming`; train_rows are the first of its rows

    @property
    def limits(self) -> Limits:
        """The limits of the base model; unknown if its files are not on this machine."""
        folder = base.folder_on_disk(self.config.model, self.config.model_kwargs.get("revision"))
        return base.limits(str(folder)) if folder else Limits(None, None, False)

    def describe(self) -> list[tuple[str, str]]:
        """The lines of the plan as (label, text)."""
        config, train = self.config, self.config.train
        learning_rate = train.get("learning_rate", 5e-5)
        steps = train.get("max_steps", -1)
        length = f"{steps} steps" if steps > 0 else _count(train.get("num_train_epochs", 3), "epoch")
        batch = train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)
        of_stage, limit = self._stage_text("extent", config.stage.config), f", at most {length}" if steps > 0 else ""
        extent = of_stage + limit if of_stage else f"{length}, batches of {batch}"
        in_memory = self._stage_text("in_memory", self)
        split = f"{'the first ' if self.stream else ''}{len(self.eval_rows)} rows of the training data"
        rows = "a stream" if self.stream else f"{len(self.train_rows)} rows"
        return [
            ("stage", self._named("stage")),
            ("model", self._model()),
            *([("options", model_kwargs.describe(config.model_kwargs))] if config.model_kwargs else []),
            *(("plugin", line) for line in self._plugins()),
            *((f"{role} from", parent.describe()) for role, parent in self.parents.items()),
            ("tuner", self._named("tuner")),
            *([("in memory", in_memory)] if in_memory else []),
            ("loss", self._named("loss")),
            *((kind, self._named(kind)) for kind in config.stage.component.uses),
            ("optimizer", f"{self._named('optimizer')}, learning rate {learning_rate:g}"),
            *(("data", line) for line in self.source.describe()),
            *(("held out", line) for line in (self.eval_source.describe() if self.eval_source else [split])),
            ("training", f"{rows}, {extent}"),
            *([("note", note)] if (note := self._stage_text("note", self)) else []),
            *(("ignored", f"train.{key}: {instead}") for key, instead in config.unused.items()),
            *([("kept", f"{', '.join(config.kept)}: settings of the run that is resumed")] if config.kept else []),
            ("run folder", str(config.folder)),
        ]

    def _model(self) -> str:
        name, revision = self.config.model, self.config.model_kwargs.get("revision")
        if name.startswith(bundled.PREFIX) or base.folder_of(base.locate(name, lambda line: None), revision):
            return name
        return f"{name} (not on this disk: training downloads it, and then checks the rows)"

    def _plugins(self) -> Iterator[str]:
        """The active third-party plugins, each with its components and run hooks."""
        for plugin in self.registry.active:
            if not plugin.builtin:
                gives = [f"{component.kind} {component.name}" for component in self.registry.components_of(plugin)]
                yield f"{plugin.name} ({plugin.provider}): {', '.join([*gives, *self.registry.run_hooks_of(plugin)])}"

    def _stage_text(self, field: str, argument: Any) -> str:
        """The text of a function of the stage, or an empty string if the stage has none."""
        stage = self.config.stage.component
        function = getattr(stage, field)
        return checks.text(self.registry.describe(stage, field), function(argument)) if function else ""

    def _named(self, kind: str) -> str:
        component = getattr(self.config, kind).component
        plugin = self.registry.provider(component)
        by = "" if plugin.builtin else f" ({plugin.provider})"
        return f"{component.name}: {component.summary}{by}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


@dataclass(frozen=True)
class Pipeline:
    """The runs to train, in order. The last one is the requested run."""

    to_train: list[Plan]
    finished: list[Parent]  # finished runs that they start from, or the requested one if it exists


def pipeline(
    registry: Registry,
    file: Mapping[str, Any],
    cli: Mapping[str, Any],
    overwrite: bool = False,
    resume: bool = False,
    trusted: bool = False,
) -> Pipeline:
    """Plan the requested run, and the runs of earlier stages that it needs.

    ``file`` and ``cli`` are as in :func:`alignkit.config.resolve`. With ``overwrite`` the requested run is trained
    again. With ``resume`` a run that exists keeps the settings that the user does not set. With ``trusted``, they and
    the file may name code to run (see :mod:`alignkit.config.trust`).

    Raises:
        AlignkitError: an error that can be detected without torch and would stop one of the runs.
    """
    planned = _Planner(registry, file, cli, overwrite, resume, trusted).plan()
    configs = [plan.config.to_dict() for plan in planned.to_train]
    configs += [run.manifest["config"] for run in planned.finished if run.manifest]
    used_plugins.check(registry, cli, configs)
    return planned


@dataclass
class _Planner:
    registry: Registry
    file: Mapping[str, Any]
    cli: Mapping[str, Any]
    overwrite: bool
    resume: bool
    trusted: bool
    result: Pipeline = field(default_factory=lambda: Pipeline([], []))
    known: dict[str, Parent] = field(default_factory=dict)  # stage -> its run

    def plan(self) -> Pipeline:
        config, parents = self._config_and_parents(resolve(self.registry, self.file, self.cli))
        if manifest.is_run(config.folder) and not self.overwrite and is_made_by(config):
            done = Parent(config.stage.component.name, config.folder, manifest.read(config.folder))
            return Pipeline([], [done])
        self.result.to_train.append(make(self.registry, config, parents))
        return self.result

    def _config_and_parents(self, config: RunConfig) -> tuple[RunConfig, dict[str, Parent]]:
        """The final config of a run and its parents. ``config`` is what the user set.

        It gets the folders of the parents, the settings that it takes from them, and those of a run that is resumed.
        """
        stage = config.stage.component
        before = recorded.settings(self.registry, config, self.overwrite) if self.resume else {}
        if before:
            config = resolve(self.registry, self.file, self.cli, stage.name, before)
        parents = {}
        for role, need in stage.needs.items():
            key = f"{stage.name}.{role}"
            if (folder := config.parents[role]) != BASE:
                parents[role] = lineage.named(key, folder, role) if folder else self._find(need, key)
        inherited = lineage.inherited(next(iter(parents.values()))) if parents else {}
        if parents:
            config = resolve(self.registry, self.file, self.cli, stage.name, merge(inherited, before))
            folders = {role: str(parent.folder) for role, parent in parents.items()}
            config = dataclasses.replace(config, parents={**config.parents, **folders})
        if before:
            without = resolve(self.registry, self.file, self.cli, stage.name, inherited)
            config = dataclasses.replace(config, kept=recorded.kept(config, without))
        for role, parent in parents.items():
            lineage.check(config, parent, f"{stage.name}.{role}")
        if not self.trusted:
            trust.check_config(self.registry, config, self.cli)
        if config.reward is not None:
            config = self._with_reward_runs(config, parents)
        for parent in parents.values():
            if parent.manifest is not None and parent not in self.result.finished:
                base.check_of_run(parent.manifest, parent.folder)
                self.result.finished.append(parent)
        return config, parents

    def _with_reward_runs(self, config: RunConfig, parents: dict[str, Parent]) -> RunConfig:
        """Find the runs that the reward needs, and add their folders to its config and the runs to ``parents``."""

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
        """The newest finished run of a stage that matches the user's settings, or one that is trained first."""
        if stage_name not in self.known:
            config = resolve(self.registry, self.file, self.cli, stage_name, may_exist=True)
            fingerprints = sources.fingerprints(config.data)
            runs = lineage.finished(Path(config.output), stage_name)
            matching = [run for run in runs if not differences(run, config, fingerprints)]
            if not matching and manifest.is_run(config.folder):
                existing = next((run for run in runs if run.folder == config.folder), None)
                if existing is None:
                    raise ConfigError(f"{config.folder} is a run of another stage. Choose another --output")
                reasons = differences(existing, config, fingerprints)
                longer = {
                    str(change)
                    for change in resume_rules.changes(manifest.read(existing.folder)["config"], config)
                    if change.extends
                }
                resume = f"extend it with alignkit train --plugin {stage_name} --resume, "
                raise ConfigError(
                    f"{config.folder} was trained with other settings: {'; '.join(reasons)}. Use it anyway with "
                    f"{key}={config.folder}, {resume if longer.issuperset(reasons) else ''}train it again with "
                    f"alignkit train --plugin {stage_name} --overwrite, or choose another --output"
                )
            if not matching:
                config, parents = self._config_and_parents(resolve(self.registry, self.file, self.cli, stage_name))
                self.result.to_train.append(make(self.registry, config, parents))
            self.known[stage_name] = matching[0] if matching else Parent(stage_name, config.folder, None, config)
        return self.known[stage_name]


def make(registry: Registry, config: RunConfig, parents: Mapping[str, Parent] | None = None) -> Plan:
    """Check everything about a run that can be checked without torch, and read its data.

    Raises:
        ConfigError: a package that a component needs is not installed; the base model cannot be used.
        DataError: from :mod:`alignkit.data`.
    """
    parents = dict(parents or {})
    chosen = [config.stage, config.tuner, config.optimizer, config.loss]
    chosen += [getattr(config, kind) for kind in config.stage.component.uses if kind != "reward"]
    chosen += reward_parts.with_parts(registry, config.reward) if config.reward else []
    for component, settings in chosen:
        registry.check_requires(component)
        if component.check and not checks.wants_plan(component):
            component.check(settings)
    for parent in parents.values():  # a reward run may use another tuner
        tuner = parent.manifest["tuner"] if parent.manifest else config.tuner.component.name
        if registry.has("tuner", tuner):
            registry.check_requires(registry.get("tuner", tuner))
    if config.chat_template is not None and not paths.expand(config.chat_template).is_file():
        raise ConfigError(f"chat_template: no file {config.chat_template}")
    base.check(config.model, revision := config.model_kwargs.get("revision"))
    base.check_trainable(config.model, revision, config.tuner.component)
    tuner, stage = config.tuner.component, config.stage.component
    if tuner.trains not in stage.trains:
        raise ConfigError(
            f"stage '{stage.name}' cannot use tuner '{tuner.name}', which trains {tuner.trains}. Choose one that "
            f"trains {' or '.join(stage.trains)}"
        )
    if config.data.path is None:
        raise ConfigError(f"stage '{stage.name}' has no default data. Add --data")
    stream = streamed.stream(registry, config) if config.data.streaming else None
    source = stream.source if stream else data.load(registry, config.data, config.data.path, stage.rows)
    sources.check_splits(config.data)
    if (eval_path := config.data.eval_path) is None:
        size, seed = config.data.eval_size, config.data.seed
        train_rows, eval_rows = stream.split if stream else held_out.split(source, size, seed)
        plan = Plan(registry, config, source, train_rows, eval_rows, None, parents, stream)
    else:
        eval_split = config.data.eval_split or config.data.split
        eval_config = dataclasses.replace(config.data, split=eval_split, streaming=False)
        eval_source = data.load(registry, eval_config, eval_path, stage.rows)
        train_rows = stream.train_rows if stream else held_out.split(source, 0, config.data.seed).train
        plan = Plan(registry, config, source, train_rows, eval_source.rows, eval_source, parents, stream)
    plan = _without_bad_rows(plan)
    for component, settings in chosen:
        if checks.wants_plan(component):
            component.check(settings, plan=plan)
    return plan


def _without_bad_rows(plan: Plan) -> Plan:
    """The plan without the rows that the chat template or the reward rejects, if ``data.on_bad_row`` is ``skip``.

    They are removed after the split, so that the choice of held-out rows depends only on the data and the seed.

    Raises:
        DataError: one of them rejects a row, and ``data.on_bad_row`` is ``error``.
    """
    from alignkit.runs import row_checks  # slow to import

    policy = plan.parents.get("policy")
    config, folder = plan.config, policy.folder if policy and policy.manifest else None
    folder = folder or base.folder_on_disk(config.model, config.model_kwargs.get("revision"))
    sides = {"train_rows": plan.train_rows, "eval_rows": plan.eval_rows}
    tokenizer = row_checks.Tokenizer.read(folder, config.chat_template) if folder else None
    rewards = reward_parts.with_parts(plan.registry, config.reward) if config.reward else []
    bad = {name: row_checks.without_fields(rewards, rows) for name, rows in sides.items()}
    if folder is not None and tokenizer is not None:
        for name, rows in sides.items():
            bad[name] |= row_checks.bad_rows(config, folder, tokenizer, rows)
    reasons = [reason for by_row in bad.values() for reason in by_row.values()]
    if not reasons:
        return plan
    if config.data.on_bad_row == "error":
        raise DataError(reasons[0])
    train_rows, eval_rows = (
        selected(rows, (index for index, row in enumerate(rows) if row.where not in bad[name]))
        for name, rows in sides.items()
    )
    for name, adjective, kept in (("train_rows", "training", train_rows), ("eval_rows", "held-out", eval_rows)):
        if sides[name] and not kept:
            first = next(iter(bad[name].values()))
            raise DataError(f"all {len(sides[name])} {adjective} rows are bad. The first: {first}")
    counted = bad["eval_rows"].values() if plan.stream else reasons  # training counts the others when it reads them
    skipped = [*plan.source.skipped, *counted]
    source = dataclasses.replace(plan.source, skipped=skipped)
    return dataclasses.replace(plan, source=source, train_rows=train_rows, eval_rows=eval_rows)
