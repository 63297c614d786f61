"""``alignkit config``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from alignkit import yaml
from alignkit.cli import common
from alignkit.components import Component
from alignkit.config import DataConfig, resolve, training_args
from alignkit.config.resolve import RunConfig, TopLevel
from alignkit.config.settings import check_defaults, nested, plain, type_text


def config(
    overrides: list[str] = common.Overrides,
    plugin: list[str] = common.Plugins,
    file: Path = common.ConfigFile,
    model: str = common.Model,
    data: list[str] = common.Data,
    output: str = common.Output,
    every: bool = typer.Option(False, "--all", help="Add every other field of TrainingArguments, as comments."),
) -> None:
    """Print the config of a stage, with a comment on every key. The output is a valid config file.

    Example: alignkit config --plugin sft --plugin qlora > run.yaml
    """
    resolved = resolve(*common.read_arguments(plugin, file, model, data, output, overrides))
    typer.echo("\n".join(commented(resolved, every)))


def commented(config: RunConfig, every: bool) -> Iterator[str]:
    """The lines of a config file that resolves to ``config``."""
    values = config.to_dict()
    help_of = {field.name: field.metadata["help"] for field in dataclasses.fields(TopLevel)}
    for key in help_of:
        yield _line(0, key, values[key], help_of[key])
    for kind in ("tuner", "optimizer"):
        yield f"{kind}:"
        yield from _component(1, values[kind], getattr(config, kind).component)
    stage = config.stage.component
    table = values["stages"][stage.name]
    yield "stages:"
    yield f"  {stage.name}:  # {stage.summary}"
    yield from _fields(2, stage.config, table)
    for role, need in stage.needs.items():
        yield _line(
            2,
            role,
            table[role],
            f"the run to start from; null: the newest matching {need} run, or train one first; base: the base model",
        )
    yield "    loss:"
    yield from _component(3, table["loss"], config.loss.component)
    for kind in stage.uses:
        yield f"    {kind}:"
        yield from _component(3, table[kind], getattr(config, kind).component)
    yield "    data:"
    yield from _fields(3, DataConfig, table["data"])
    yield "    train:  # fields of transformers.TrainingArguments, by their own names"
    fields = training_args.fields()
    for key, value in config.train.items():
        yield _line(3, key, value, fields[key].help)
    if every:
        for name, field in fields.items():
            if name not in config.train and name not in stage.refuses:
                yield "      # " + _line(0, name, field.default, field.help)


def _component(depth: int, table: dict[str, Any], component: Any) -> Iterator[str]:
    yield _line(depth, "name", component.name, component.summary)
    yield from _fields(depth, component.config, table)


def _fields(depth: int, cls: type, table: dict[str, Any], types: bool = False) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        value, help = table[field.name], field.metadata.get("help", "")
        inner = nested(cls, field.name)
        if inner is not None and isinstance(value, dict):
            yield "  " * depth + f"{field.name}:" + (f"  # {help}" if help else "")
            yield from _fields(depth + 1, inner, value, types)
        else:
            type_ = f"{type_text(typing.get_type_hints(cls, include_extras=True)[field.name])}" if types else ""
            yield _line(depth, field.name, value, " ".join(filter(None, [help, type_ and f"({type_})"])))


def fields_with_help(component: Component) -> list[str]:
    """The default settings of a component as lines of a config file, each with its help and type."""
    check_defaults(component)
    return list(_fields(1, component.config, plain(component.config()), types=True))


def fields_as_json(component: Component) -> list[dict[str, Any]]:
    """The default settings of a component, each with its help and type. Those of a table have dotted keys."""
    check_defaults(component)
    return list(_objects("", component.config, plain(component.config())))


def _objects(prefix: str, cls: type, table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    types = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        key, value, inner = prefix + field.name, table[field.name], nested(cls, field.name)
        if inner is not None and isinstance(value, dict):
            yield from _objects(f"{key}.", inner, value)
        else:
            help = field.metadata.get("help", "")
            yield {"key": key, "default": value, "help": help, "type": type_text(types[field.name])}


def _line(depth: int, key: str, value: Any, help: str) -> str:
    written = yaml.dumps_inline(value)
    return "  " * depth + f"{key}: {written}" + (f"  # {help}" if help else "")
