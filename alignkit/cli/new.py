"""``alignkit new``."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import typer

from alignkit import API_VERSION
from alignkit.errors import ConfigError
from alignkit.registry import Registry
from alignkit.registry.plugin import installed

TEMPLATES = Path(__file__).parents[1] / "templates"

# kind -> summary of the generated plugin, and a command that uses it
KINDS = {
    "loss": ("A loss that gives hard tokens more weight", "train --plugin sft --plugin my-thing"),
    "stage": ("A stage: fine-tuning on demonstrations", "train --plugin my-thing"),
    "tuner": ("A tuner that trains the last layers only", "train --plugin sft --plugin my-thing"),
    "optimizer": ("SGD with momentum", "train --plugin sft --plugin my-thing"),
    "data": ("A data format: question, best_answer", "train --plugin sft --plugin my-thing --data quiz.jsonl"),
    "reward": ("A reward for answers of a certain length", "train --plugin ppo --plugin my-thing"),
    "judge": (
        "A judge that prefers shorter answers",
        "rank answers.jsonl --by my-thing -p my-thing -o ranked.jsonl",
    ),
    "hooks": ("Run hooks that write a note on every finished run", "train --plugin sft --plugin my-thing"),
    "rollout": ("A rollout engine that samples one prompt at a time", "train --plugin ppo --plugin my-thing"),
}
Kind = Enum("Kind", {kind: kind for kind in KINDS})  # type: ignore[misc]  # typer shows the values as choices


def new(
    name: str = typer.Argument(metavar="NAME", help="The name for --plugin: lowercase letters, digits and hyphens."),
    kind: Kind = typer.Option(..., "--kind", "-k", help="The kind of plugin."),
) -> None:
    """Create a plugin from a template. The folder ./alignkit-NAME holds one module and one test."""
    name = name.removeprefix("alignkit-")
    folder = Path(f"alignkit-{name}")
    check_name(name)
    if folder.exists():
        raise ConfigError(f"{folder} already exists. Choose another name, or remove it")
    summary, command = KINDS[kind.value]
    folder.mkdir()
    for template in sorted([*TEMPLATES.glob("*.*"), *(TEMPLATES / kind.value).glob("*.py")]):
        text = template.read_text(encoding="utf-8")
        text = text.replace("SUMMARY", summary).replace("COMMAND", f"alignkit {command}")
        text = text.replace("REQUIREMENT", requirement()).replace("my-thing", name)
        file = folder / filled(template.name, name)
        file.write_text(filled(text, name), encoding="utf-8")
        typer.echo(file)
    typer.echo(f"\ninstall: alignkit install -e {folder}")
    typer.echo(f"use:     alignkit {command.replace('my-thing', name)}")
    typer.echo(f"test:    pytest {folder}")


def filled(text: str, name: str) -> str:
    """The text or file name of a template, for the module of a plugin."""
    return text.replace("my_thing", name.replace("-", "_"))


def requirement() -> str:
    """The versions with the current plugin API: ``"alignkit>=0.1,<0.2"``."""
    major, minor = API_VERSION.split(".")
    return f"alignkit>={API_VERSION},<{major}.{int(minor) + 1}"


def check_name(name: str) -> None:
    """Check the name of a new plugin.

    Raises:
        ConfigError: the name is invalid, or an installed plugin or component has it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"invalid plugin name '{name}'. Use lowercase letters and digits, separated by hyphens")
    if name == "check":
        raise ConfigError("invalid plugin name 'check': `alignkit plugins check` is a command")
    registry = Registry()
    taken = {plugin.name: plugin.provider for plugin in installed()}
    taken |= {c.name: p.provider for p in registry.active for c in registry.components_of(p)}
    if name in taken:
        raise ConfigError(f"{taken[name]} already provides '{name}'. Choose another name")
