"""The layers of a config, and which of them hold for which stage.

A source (the config file, the command line) is a layer for each plugin that it names, with what that picks, and above
them a layer with its own tables: what a source says outright wins over what its plugins pick.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.components import KINDS, Component, Stage
from alignkit.config.reward_parts import stages_needed
from alignkit.config.settings import as_table, merge, names, select
from alignkit.errors import ConfigError, did_you_mean
from alignkit.registry import Registry
from alignkit.registry.plugin import bare

OF_A_STAGE = ("loss", "reward", "rollout")  # kinds that a shared table gives to the stages that can use them alone


@dataclass(frozen=True)
class Layer:
    """Shared tables, and tables of single stages, which win over them."""

    shared: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    from_cli: bool
    picks: str | None = None  # the plugin whose components these are

    @property
    def picks_several(self) -> bool:
        """Whether its plugin gives components of several kinds, so that some of them may have no use here."""
        return self.picks is not None and len(self.shared) + len(self.stages) > 1

    def table(self, key: str) -> Mapping[str, Any]:
        """A shared table."""
        return as_table(self.shared.get(key), key)

    def of(self, stage: str, key: str) -> Mapping[str, Any]:
        """A table inside a stage's table."""
        return as_table(self.stages.get(stage, {}).get(key), f"stages.{stage}.{key}")


def layers(registry: Registry, source: Mapping[str, Any], asked: str, from_cli: bool) -> Iterator[Layer]:
    """A source's layers, lowest first. ``sft: {...}`` at its top is ``stages: {sft: {...}}``."""
    known = {stage.name for stage in registry.all("stage")}
    source = _with_format_tables(source)
    tables = as_table(source.get("stages"), "stages")
    for name in tables:
        if name not in known:
            raise ConfigError(f"unknown stage '{name}' under stages.{did_you_mean(name, known)}")
    if "stage" in source:
        raise ConfigError("unknown key stage. A stage is named with --plugin NAME, or in plugins")
    for name in map(bare, plugins(source)):
        kinds = [kind for kind in KINDS if kind != "stage" and registry.has(kind, name)]
        if name in known:  # a stage's name picks no loss: TRL has one called sft
            kinds = [kind for kind in kinds if kind not in OF_A_STAGE]
        picked = {kind: {"name": name} for kind in kinds if kind != "format"}
        of_asked = {asked: {"data": {"format": {"name": name}}}} if "format" in kinds else {}
        yield Layer(picked, of_asked, from_cli, picks=name)
    short = {key: as_table(value, f"stages.{key}") for key, value in source.items() if key in known}
    long = {key: as_table(value, f"stages.{key}") for key, value in tables.items()}
    shared = {key: value for key, value in source.items() if key not in (*known, "stages")}
    yield Layer(shared, merge(long, short), from_cli)


def plugins(source: Mapping[str, Any]) -> list[str]:
    """The plugins that a source names."""
    given = source.get("plugins") or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"plugins must be a list of names, not {given!r}")
    return given


def to_train(registry: Registry, of: Sequence[Layer], asked: str) -> list[Stage]:
    """The stage that was asked for, and those before it that may have to be trained: whose runs are not named."""
    stage = registry.stage(asked)
    named = {role for layer in of for role, run in layer.stages.get(asked, {}).items() if run is not None}
    needs = {role: need for role, need in stage.needs.items() if role not in named}
    if "reward" in stage.uses:
        tables = [table for layer in of for table in (layer.table("reward"), layer.of(asked, "reward"))]
        needs |= stages_needed(registry, select(registry, "reward", stage.uses["reward"], tables))
    return [stage, *(each for need in needs.values() for each in to_train(registry, of, need))]


def fits(component: Component, stage: Stage) -> bool:
    """Whether a stage can use a loss, a reward or a rollout engine."""
    return component.kind in stage.uses or getattr(component, "batch", None) is stage.batch


def shared_tables(
    registry: Registry, of: Sequence[Layer], layer: Layer, stage: Stage, trained: Sequence[Stage], there: bool
) -> dict[str, Any]:
    """What a layer's shared tables say to ``stage``, which is one of those in ``trained``; its first was asked for.

    Of a loss, a reward or a rollout engine, a table with a name is for the stages that can use that component; a key
    without a name is for the stages whose component has it. What fits no stage is left to the one that was asked for,
    which refuses it. With ``there``, the command line counts only as far as it is about the model, or is not for the
    stage that was asked for.
    """
    asked, tables = trained[0], dict(layer.shared)
    for kind in OF_A_STAGE:
        if kind in tables:
            tables[kind] = _for(registry, of, layer, kind, stage, trained)
    if not there or not layer.from_cli:
        return tables
    kept = {"model", "output", "chat_template", "tuner"}
    for kind in OF_A_STAGE:
        if layer.picks or not _for(registry, of, layer, kind, asked, trained):
            kept.add(kind)
    return {key: table for key, table in tables.items() if key in kept}


def _for(
    registry: Registry, of: Sequence[Layer], layer: Layer, kind: str, stage: Stage, trained: Sequence[Stage]
) -> dict[str, Any]:
    table = layer.table(kind)

    def taken(by: Stage) -> set[str]:
        if isinstance(name := table.get("name"), str):
            return set(table) if fits(registry.get(kind, name), by) else set()
        component = _component(registry, of, kind, by)
        return set(table) & set(names(component.config)) if component else set()

    keys = taken(stage)
    if stage is trained[0] and not layer.picks_several:
        keys |= set(table).difference(*map(taken, trained))
    return {key: value for key, value in table.items() if key in keys}


def _component(registry: Registry, of: Sequence[Layer], kind: str, stage: Stage) -> Component | None:
    """The component of a kind that a stage will use; None: it uses none."""
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
    """``data.format`` as a table with a name wherever it is a name alone, so that its settings merge with it."""
    spelt = {key: _with_format_tables(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    data = spelt.get("data")
    if isinstance(data, dict) and isinstance(data.get("format", {}), str | None):
        data["format"] = {"name": data["format"]}
    return spelt
