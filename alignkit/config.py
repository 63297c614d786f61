"""From YAML, flags and ``key.path=value`` to one typed :class:`RunConfig`.

Four layers, the later wins, table by table: the file's shared tables, the file's table for the stage, the command
line's shared keys, the command line's keys for the stage. Below them are the stage's defaults, and over those, on a
bundled model, what its recipe says. No layer is special to a component: a component's table is
whatever its config dataclass says. One command may train several stages: each is resolved by itself, from the same
layers (see :mod:`alignkit.plan`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alignkit import bundled, training_args, yaml
from alignkit.components import KINDS, Component, Stage, option
from alignkit.errors import ConfigError, did_you_mean, one_line
from alignkit.plugin import bare
from alignkit.registry import Registry


@dataclass(frozen=True)
class DataConfig:
    """The ``data`` table: which rows a stage trains on."""

    path: str | None = option(None, "a file (.jsonl .json .csv .parquet), a folder or a hub id; null: the stage's own")
    name: str | None = option(None, "the subset of a hub data set")
    split: str = option("train", "the split of a hub data set, or of a folder whose files are named train, test, ...")
    format: str | dict[str, Any] | None = option(
        None, "how rows are written: a name, or a table of name and settings; null: recognised by their fields"
    )
    on_bad_row: Literal["error", "skip"] = option("error", "error: stop at a bad row; skip: count and report them")
    eval_path: str | None = option(None, "a second source with the held-out rows; null: rows are split off")
    eval_split: str | None = option(None, "the split of eval_path, where it has splits; null: as split")
    eval_size: float | None = option(None, "rows to hold out: below 1 a share, else a count; null: 10 %, at most 200")
    seed: int = option(0, "which rows are held out")


@dataclass(frozen=True)
class TopLevel:
    """The keys of a config file that are not tables of a component."""

    model: str = option("bundled:smollm2-135m", "base of every stage: a hub id, a folder, or bundled:smollm2-135m")
    output: str = option("runs", "run folders are made in it: runs/sft, runs/rm, ...")
    plugins: list[str] = option([], "plugins to activate and pick; --plugin adds to these")
    chat_template: str | None = option(None, "a Jinja file; null: the tokenizer's own, else the plain template")


class Selected(NamedTuple):
    """A component that was picked, with its table."""

    component: Any  # a Component; Any spares a cast at every use
    config: Any  # an instance of component.config


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run of one stage was told. It reproduces the run."""

    stated: dict[str, Any]  # what the user said of this stage, in the shape of `to_dict`; the rest are defaults
    model: str
    output: str
    plugins: list[str]
    chat_template: str | None
    stage: Selected
    tuner: Selected
    optimizer: Selected
    loss: Selected
    data: DataConfig
    train: dict[str, Any]  # over the defaults of TrainingArguments, by its names
    parents: dict[str, str | None]  # where each role that the stage needs comes from: a run folder, "base", or unsaid
    reward: Selected | None = None  # only of a stage that uses one
    rollout: Selected | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output) / self.stage.component.name

    def to_dict(self) -> dict[str, Any]:
        """As in a config file: resolving it again gives this same config."""
        return {
            "model": self.model,
            "output": self.output,
            "plugins": self.plugins,
            "chat_template": self.chat_template,
            "tuner": _named(self.tuner),
            "optimizer": _named(self.optimizer),
            "stages": {
                self.stage.component.name: {
                    **dataclasses.asdict(self.stage.config),
                    **self.parents,
                    **{kind: _named(getattr(self, kind)) for kind in self.stage.component.uses},
                    "loss": _named(self.loss),
                    "data": dataclasses.asdict(self.data),
                    "train": self.train,
                }
            },
        }

    def to_yaml(self) -> str:
        """:meth:`to_dict` as YAML."""
        return yaml.dumps(self.to_dict())


def parse_override(text: str) -> dict[str, Any]:
    """``"a.b=1"`` as ``{"a": {"b": 1}}``."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"'{text}' is not an override: write key.path=value, such as train.max_steps=20")
    *tables, last = path.split(".")
    nested: dict[str, Any] = {last: yaml.loads(value, text) if value else None}
    for table in reversed(tables):
        nested = {table: nested}
    return nested


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping from several, the later wins; nested mappings are merged, everything else is replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge(old if isinstance(old, Mapping) else {}, value)
            else:
                merged[key] = copy.deepcopy(value)
    return merged


def asked_stage(registry: Registry, file: Mapping[str, Any], cli: Mapping[str, Any]) -> str:
    """The stage that ``plugins`` name last; activates every plugin that is named.

    Raises:
        ConfigError: none is named.
        PluginError: from the registry.
    """
    names = [*_plugins(file), *_plugins(cli)]
    registry.activate(*names)
    stages = [name for name in map(bare, names) if registry.has("stage", name)]
    if not stages:
        known = ", ".join(stage.name for stage in registry.all("stage"))
        raise ConfigError(f"no stage was named. Add --plugin NAME; stages: {known}")
    return stages[-1]


def resolve(
    registry: Registry,
    file: Mapping[str, Any],
    cli: Mapping[str, Any],
    stage_name: str | None = None,
    inherited: Mapping[str, Any] | None = None,
    there: bool = False,
) -> RunConfig:
    """The config of a stage: of the one that was asked for, or of ``stage_name``, which comes before it.

    ``file`` is a config file's content, ``cli`` the same shape from flags and overrides (see :func:`parse_override`);
    ``plugins`` in either activates plugins and picks every component of those names. ``inherited`` is what holds where
    neither says anything: the settings of the run that this one goes on from. With ``there`` it is the config of a run
    that may be there already: shared settings on the command line, which are for what is trained now, do not count.

    Raises:
        ConfigError: no stage; an unknown key, with the closest known one; a value of the wrong type; a loss that does
            not fit the stage.
        PluginError: from the registry.
    """
    asked = asked_stage(registry, file, cli)
    stage_name = stage_name or asked
    stage = registry.stage(stage_name)
    layers = [_layer(registry, source, asked) for source in (file, cli)]
    for kind in ("reward", "rollout"):  # in a file they may be for another command; here they would do nothing
        if kind in layers[1] and not any(kind in each.uses for each in _with_needs(registry, asked)):
            raise ConfigError(f"{kind} is for no stage that is trained here: {asked} uses none")

    shared = [*_names(TopLevel), "data", "train", *(kind for kind in KINDS if kind not in ("stage", "format"))]
    unused = [kind for kind in ("reward", "rollout") if kind not in stage.uses]
    own = [*_names(stage.config), *stage.needs, *(key for key in shared if key not in ("plugins", *unused))]
    tables: list[Mapping[str, Any]] = []
    own_data = any(
        "path" in _as_table(_as_table(table, stage_name).get("data"), "data")
        for layer in layers
        for table in (layer, layer["stages"].get(stage_name))
    )
    for layer in layers:
        of_stage = _as_table(layer["stages"].get(stage_name), f"stages.{stage_name}")
        _known_keys(layer, [*shared, "stages"], "")
        _known_keys(of_stage, own, f"{stage_name}.")
        like = _as_table(layer["stages"].get(stage.data_of), f"stages.{stage.data_of}")
        if "data" in like and not own_data:
            of_stage = merge({"data": like["data"]}, of_stage)
        tables += [{k: v for k, v in layer.items() if k != "stages"}, of_stage]
    if there:
        which = ("model", "output", "chat_template", "tuner")
        tables[2] = {key: value for key, value in tables[2].items() if key in which}
    said = merge(*tables)
    own_path = _as_table(said.get("data"), "data").get("path")
    recipe = bundled.recipe(merge(inherited or {}, said).get("model") or TopLevel.model, stage_name, own_path)
    tables[:0] = [{key: value for key, value in recipe.items() if key != "train"}, inherited or {}]
    if stage_name != asked:  # a shared loss is meant for the stages that it fits
        tables = [_without_misfits(registry, stage, table) for table in tables]
    merged = {key: value for key, value in merge(*tables).items() if key not in unused}

    top = _typed(TopLevel, {k: merged.pop(k) for k in _names(TopLevel) if k in merged}, "")
    data = _typed(DataConfig, _as_table(merged.pop("data", None), "data"), "data.")
    data = dataclasses.replace(data, path=data.path or stage.data, format=_format(registry, tables))
    if "format" in _as_table(said.get("data"), "data"):
        said["data"]["format"] = data.format
    train = training_args.check(_as_table(merged.pop("train", None), "train"))
    parents = {role: merged.pop(role, None) for role in stage.needs}
    for role, named in parents.items():
        if named is not None and not isinstance(named, str):
            raise ConfigError(f"{stage_name}.{role} must be a run folder or base, not {named!r}")
    defaults = {"tuner": "lora", "optimizer": "adamw", "loss": stage.loss, **stage.uses}
    chosen = {}
    for kind, default in defaults.items():
        merged.pop(kind, None)
        chosen[kind] = select(registry, kind, default, [_as_table(table.get(kind), kind) for table in tables])
    loss, tuner = chosen["loss"].component, chosen["tuner"].component
    if not _fits(loss, stage):
        fitting = ", ".join(c.name for c in registry.all("loss") if _fits(c, stage))
        raise ConfigError(
            f"loss '{loss.name}' takes {loss.batch.__name__}, but stage '{stage_name}' gives "
            f"{stage.batch.__name__}. Losses that fit: {fitting}"
        )
    return RunConfig(
        stated=_stated(stage, said),
        model=top.model,
        output=top.output,
        plugins=[*(name for name in registry.asked if name != stage_name), stage_name],
        chat_template=top.chat_template,
        stage=Selected(stage, _typed(stage.config, merged, f"{stage_name}.")),
        data=data,
        train=_train({**stage.train, **recipe.get("train", {})}, tuner.lr_scale, train),
        parents=parents,
        **chosen,
    )


def _with_needs(registry: Registry, stage_name: str) -> list[Stage]:
    """A stage, and those that may have to be trained before it."""
    stage = registry.stage(stage_name)
    return [stage, *(each for need in stage.needs.values() for each in _with_needs(registry, need))]


def _fits(component: Component, stage: Stage) -> bool:
    return getattr(component, "batch", None) is stage.batch


def _without_misfits(registry: Registry, stage: Stage, table: Mapping[str, Any]) -> Mapping[str, Any]:
    name = _as_table(table.get("loss"), "loss").get("name")
    if name is None or _fits(registry.get("loss", name), stage):
        return table
    return {key: value for key, value in table.items() if key != "loss"}


def _stated(stage: Stage, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said, in the shape of :meth:`RunConfig.to_dict`."""
    shared = ("model", "chat_template", "tuner", "optimizer")
    of_run: dict[str, Any] = {key: said[key] for key in shared if key in said}
    own = (*_names(stage.config), *stage.needs, *stage.uses, "loss", "data", "train")
    of_stage = {key: said[key] for key in own if key in said}
    return {**of_run, "stages": {stage.name: of_stage}}


def _train(defaults: dict[str, Any], lr_scale: float, train: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said over the stage's defaults, key by key."""
    defaults = {"report_to": "none", "save_total_limit": 2, **defaults}
    if "learning_rate" in defaults:  # LoRA wants about ten times the rate of full fine-tuning, whatever the stage
        defaults["learning_rate"] = float(f"{defaults['learning_rate'] * lr_scale:.6g}")
    if train.get("lr_scheduler_type", defaults.get("lr_scheduler_type")) != defaults.get("lr_scheduler_type"):
        defaults.pop("lr_scheduler_kwargs", None)  # they were for the stage's scheduler
    return {**defaults, **train}


def _plugins(source: Mapping[str, Any]) -> list[str]:
    names = source.get("plugins") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"plugins must be a list of names, not {names!r}")
    return names


def _layer(registry: Registry, source: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """``source`` with its plugins' picks as tables, and ``sft: {...}`` at its top moved to ``stages: {sft: {...}}``.

    A tuner and an optimizer are picked for every stage, a data format for the one that was asked for, and a loss for
    those of the stages to be trained that it fits. What fits nowhere is left out where there is something else of that
    name; otherwise it is the asked-for stage's, and an error.
    """
    stages = {stage.name for stage in registry.all("stage")}
    source = _with_format_tables(source)
    tables = _as_table(source.get("stages"), "stages")
    for name in tables:
        if name not in stages:
            raise ConfigError(f"unknown stage '{name}' under stages.{did_you_mean(name, stages)}")
    if "stage" in source:
        raise ConfigError("unknown key stage. A stage is named with --plugin NAME, or in plugins")
    picks: dict[str, Any] = {"stages": {}}
    for name in map(bare, _plugins(source)):
        kinds = [kind for kind in KINDS if registry.has(kind, name)]
        for kind in kinds:
            if kind in ("tuner", "optimizer"):
                picks = merge(picks, {kind: {"name": name}})
            elif kind == "format":
                picks = merge(picks, {"stages": {asked: {"data": {"format": {"name": name}}}}})
            elif kind != "stage" and name not in stages:  # a stage's name picks no loss: TRL has one called sft
                component = registry.get(kind, name)
                fitting = [s.name for s in _with_needs(registry, asked) if _fits(component, s) or kind in s.uses]
                fitting = fitting or ([asked] if len(kinds) == 1 else [])
                picks = merge(picks, {"stages": {stage: {kind: {"name": name}} for stage in fitting}})
    short = {key: value for key, value in source.items() if key in stages}
    rest = {key: value for key, value in source.items() if key not in (*stages, "stages")}
    return merge(picks, rest, {"stages": tables}, {"stages": short})


def select(registry: Registry, kind: str, name: str, tables: Iterable[Mapping[str, Any]]) -> Selected:
    """The component that the last table names, with its keys; keys of another that it replaces are left behind."""
    component, own = registry.get(kind, name), dict[str, Any]()
    for table in tables:
        if table.get("name", component.name) != component.name:
            if not isinstance(table["name"], str):
                raise ConfigError(f"{kind}.name must be a name, not {table['name']!r}")
            former, component = component, registry.get(kind, table["name"])
            left = set(_names(former.config)) - set(_names(component.config))
            own = {key: value for key, value in own.items() if key not in left}
        own = merge(own, {key: value for key, value in table.items() if key != "name"})
    return Selected(component, _typed(component.config, own, f"{kind}."))


def data_format(registry: Registry, written: str | Mapping[str, Any] | None) -> Selected | None:
    """The format that ``data.format`` names, with its settings; None where rows are to be recognised by their fields.

    Raises:
        ConfigError: settings of no format; an unknown one, or one of the wrong type.
        PluginError: no active plugin gives the format.
    """
    table = {"name": written} if isinstance(written, str) else written
    if not table:
        return None
    if not isinstance(name := table.get("name"), str):
        raise ConfigError(f"data.format has settings, but the name of no format (got {name!r}): set data.format.name")
    return select(registry, "format", name, [table])


def _format(registry: Registry, tables: Iterable[Mapping[str, Any]]) -> str | dict[str, Any] | None:
    """``data.format`` of all tables, as the run's config holds it: a name alone where the format has no settings."""
    written: dict[str, Any] = {}
    for table in tables:
        later = _as_table(_as_table(table.get("data"), "data").get("format"), "data.format")
        another = {"name"} <= written.keys() & later.keys() and written["name"] != later["name"]
        written = merge({} if another else written, later)
    chosen = data_format(registry, {} if written == {"name": None} else written)
    if chosen is None:
        return None
    named = _named(chosen)
    return named if len(named) > 1 else chosen.component.name


def _with_format_tables(table: Mapping[str, Any]) -> dict[str, Any]:
    """``data.format`` as a table with a name wherever it is a name alone, so that its settings merge with it."""
    spelt = {key: _with_format_tables(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    data = spelt.get("data")
    if isinstance(data, dict) and isinstance(data.get("format", {}), str | None):
        data["format"] = {"name": data["format"]}
    return spelt


def _named(selected: Selected) -> dict[str, Any]:
    return {"name": selected.component.name, **dataclasses.asdict(selected.config)}


def _as_table(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a table, not {value!r}")
    return value


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _known_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {where}{key}.{did_you_mean(key, known)} Known here: {', '.join(sorted(known)) or 'none'}"
            )


def check_defaults(component: Component) -> None:
    """Whether a component's config has defaults of its own types, and a stage's those of ``TrainingArguments``.

    Raises:
        ConfigError: a field without a default or of another type; a field of no type that can be checked.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(component.config) if f.default is not dataclasses.MISSING}
    _typed(component.config, defaults, "config.")
    if isinstance(component, Stage):
        training_args.check(component.train)


def _typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a config dataclass, every value of its field's type."""
    from pydantic import TypeAdapter, ValidationError  # here: `--help` does without
    from pydantic.errors import PydanticUserError

    _known_keys(values, _names(cls), where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except PydanticUserError as error:
        raise ConfigError(f"{cls.__module__}.{cls.__name__} is no config: {one_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}{key}: {first['msg']} (got {first['input']!r})") from None
