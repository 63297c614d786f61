"""The layers of a config, and which of them apply to which stage.

A source (the config file or the command line) consists of a layer for each plugin that it names, which selects the
components of the plugin, and above them a layer with its own tables. So an explicit setting takes precedence over the
selection of a plugin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.components import KINDS, Component, Stage
from alignkit.config.reward_parts import stages_needed
from alignkit.config.settings import as_table, merge, names, select
from alignkit.errors import ConfigError, suggestion
from alignkit.registry import Registry
from alignkit.registry.plugin import in_memory, plugin_name

OF_A_RUN = tuple(kind for kind in KINDS if kind not in ("stage", "format", "judge"))  # each has a table of its own
TABLES = ("data", "train", "model_kwargs", *OF_A_RUN)
OF_A_STAGE = ("loss", "reward", "rollout")  # a shared table of these kinds applies only to stages that can use it


@dataclass(frozen=True)
class Layer:
    """Shared tables, and tables of single stages, which take precedence."""

    shared: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    from_cli: bool
    picks: str | None = None  # the plugin whose components this layer selects

    @property
    def picks_several(self) -> bool:
        """Whether its plugin provides several kinds of components, some of which may be unused here."""
        return self.picks is not None and len(self.shared) + len(self.stages) > 1

    def table(self, key: str) -> Mapping[str, Any]:
        """A shared table."""
        return as_table(self.shared.get(key), key)

    def of(self, stage: str, key: str) -> Mapping[str, Any]:
        """A table in the table of a stage."""
        return as_table(self.stages.get(stage, {}).get(key), f"stages.{stage}.{key}")


def layers(registry: Registry, source: Mapping[str, Any], requested: str, from_cli: bool) -> Iterator[Layer]:
    """The layers of a source, lowest first. ``sft: {...}`` at the top level means ``stages: {sft: {...}}``."""
    known = {stage.name for stage in registry.all("stage")}
    source = _with_format_tables(source)
    tables = as_table(source.get("stages"), "stages")
    for name in tables:
        if name not in known:
            raise ConfigError(suggestion(f"unknown stage '{name}' under stages", name, known))
    if "stage" in source:
        raise ConfigError("unknown key stage. Choose a stage with --plugin NAME, or in the list plugins")
    for requested_plugin in plugins(source):
        name = plugin_name(requested_plugin)
        kinds = [kind for kind in (*OF_A_RUN, "format") if registry.has(kind, name)]
        if in_memory([requested_plugin]):  # a reward function called `full` does not select the tuner
            own = [plugin for plugin in registry.active if plugin.is_from(requested_plugin.partition("@")[2])]
            provided = {each.kind for plugin in own for each in registry.components_of(plugin) if each.name == name}
            kinds = [kind for kind in kinds if kind in provided]
        if name in known:  # the name of a stage does not select a loss: TRL has a loss named sft
            kinds = [kind for kind in kinds if kind not in OF_A_STAGE]
        picked = {kind: {"name": name} for kind in kinds if kind != "format"}
        of_asked = {requested: {"data": {"format": {"name": name}}}} if "format" in kinds else {}
        yield Layer(picked, of_asked, from_cli, picks=name)
    short = {key: as_table(value, f"stages.{key}") for key, value in source.items() if key in known}
    long = {key: as_table(value, f"stages.{key}") for key, value in tables.items()}
    shared = {key: value for key, value in source.items() if key not in (*known, "stages")}
    of_stages = {name: _without_empty_tables(table) for name, table in merge(long, short).items()}
    yield Layer(_without_empty_tables(shared), of_stages, from_cli)


def _without_empty_tables(source: Mapping[str, Any]) -> dict[str, Any]:
    """``train:`` without keys below it, which YAML reads as null, changes nothing, as ``train: {}``."""
    return {key: value for key, value in source.items() if value is not None or key not in TABLES}


def plugins(source: Mapping[str, Any]) -> list[str]:
    """The plugins that a source names."""
    value = source.get("plugins") or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"plugins must be a list of names, not {value!r}")
    return value


def to_train(registry: Registry, of: Sequence[Layer], requested: str) -> list[Stage]:
    """The requested stage, and the earlier stages that may have to be trained because no run of them is named."""
    stage = registry.stage(requested)
    named = {role for layer in of for role, run in layer.stages.get(requested, {}).items() if run is not None}
    needs = {role: need for role, need in stage.needs.items() if role not in named}
    if "reward" in stage.uses:
        tables = [table for layer in of for table in (layer.table("reward"), layer.of(requested, "reward"))]
        needs |= stages_needed(registry, select(registry, "reward", stage.uses["reward"], tables))
    return [stage, *(each for need in needs.values() for each in to_train(registry, of, need))]


def fits(component: Component, stage: Stage) -> bool:
    """Whether a stage can use a loss, a reward or a rollout engine."""
    return component.kind in stage.uses or getattr(component, "batch", None) is stage.batch


def shared_tables(
    registry: Registry, of: Sequence[Layer], layer: Layer, stage: Stage, trained: Sequence[Stage], may_exist: bool
) -> dict[str, Any]:
    """The shared tables of a layer that apply to ``stage``.

    ``trained`` are the stages of the command; the first is the requested one. A loss, reward or rollout table with a
    name applies to the stages that can use that component. A key without a name applies to the stages whose component
    has it. Keys that fit no stage are left to the requested stage, which rejects them. With ``may_exist``, shared
    tables of the command line apply only if they concern the model or are not for the requested stage.
    """
    requested, tables = trained[0], dict(layer.shared)
    for kind in OF_A_STAGE:
        if kind in tables:
            tables[kind] = _for(registry, of, layer, kind, stage, trained)
    if not may_exist or not layer.from_cli:
        return tables
    kept = {"model", "model_kwargs", "output", "chat_template", "tuner"}
    for kind in OF_A_STAGE:
        if layer.picks or not _for(registry, of, layer, kind, requested, trained):
            kept.add(kind)
    return {key: table for key, table in tables.items() if key in kept}


def _for(
    registry: Registry, of: Sequence[Layer], layer: Layer, kind: str, stage: Stage, trained: Sequence[Stage]
) -> dict[str, Any]:
    table = layer.table(kind)

    def accepted(by: Stage) -> set[str]:
        if isinstance(name := table.get("name"), str):
            return set(table) if fits(registry.get(kind, name), by) else set()
        component = _component(registry, of, kind, by)
        return set(table) & set(names(component.config)) if component else set()

    keys = accepted(stage)
    if stage is trained[0] and not layer.picks_several:
        keys |= set(table).difference(*map(accepted, trained))
    return {key: value for key, value in table.items() if key in keys}


def _component(registry: Registry, of: Sequence[Layer], kind: str, stage: Stage) -> Component | None:
    """The component of a kind that a stage will use, or None."""
    default = stage.loss if kind == "loss" else stage.uses.get(kind)
    if default is None:
        return None
    component = registry.get(kind, default)
    for layer in of:
        for table, own in ((layer.table(kind), False), (layer.of(stage.name, kind), True)):
            if isinstance(name := table.get("name"), str) and (own or fits(registry.get(kind, name), stage)):
                component = registry.get(kind, name)
    return component


def _with_format_tables(table: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``data.format: NAME`` as ``data.format: {name: NAME}``, so that settings of the format merge with it."""
    result = {key: _with_format_tables(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    data = result.get("data")
    if isinstance(data, dict) and isinstance(data.get("format", {}), str | None):
        data["format"] = {"name": data["format"]}
    return result
