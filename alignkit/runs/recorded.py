"""The settings of the run that a command resumes. A resume keeps those that the user does not set."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit import yaml
from alignkit.components import Stage
from alignkit.config import DataConfig, model_kwargs, resume_rules
from alignkit.config.resolve import RunConfig
from alignkit.config.settings import names
from alignkit.errors import AlignkitError
from alignkit.registry import Registry, in_memory
from alignkit.registry.plugin import plugin_name
from alignkit.runs import manifest, record

CONFIG = "config.yaml"
LENGTHS = ("num_train_epochs", "iterations")  # settings that have no effect beside train.max_steps


def read(folder: Path) -> dict[str, Any]:
    """The config of a run, finished or not, as ``config.yaml`` in its folder records it.

    Raises:
        AlignkitError: it cannot be read, or a value has another type than alignkit writes. A missing key is an error
            when it is read.
    """
    record.check_files(folder)
    config = record.checked(yaml.load(folder / CONFIG), record.CONFIG, folder / CONFIG)
    if not config["stages"]:
        raise AlignkitError(f"{folder / CONFIG} has no stage: {record.EDITED}")
    return config


def previous(config: RunConfig) -> Path | None:
    """The folder of the run that a resume continues: the unfinished run, else the finished one."""
    return next((f for f in (manifest.unfinished(config.folder), config.folder) if (f / CONFIG).exists()), None)


def settings(registry: Registry, config: RunConfig, overwrite: bool) -> dict[str, Any]:
    """The recorded settings of the run that ``config`` resumes, for :func:`alignkit.config.resolve` to inherit.

    They are empty if there is no such run, or ``overwrite`` replaces it. The plugins of the run are activated, except
    those that the user takes from another distribution: :mod:`alignkit.config.resume_rules` refuses these.
    """
    folder = previous(config)
    if folder is None or (overwrite and folder == config.folder):
        return {}
    before, stage = read(folder), config.stage.component
    given = set(map(plugin_name, registry.requested))
    registry.activate(*(name for name in before["plugins"] if plugin_name(name) not in given))
    known = (*names(stage.config), *stage.needs, *stage.uses, "loss", "data", "train")
    table = {key: value for key, value in before["stages"][stage.name].items() if key in known}
    table["data"] = {key: value for key, value in table["data"].items() if key in names(DataConfig)}
    if isinstance(written := table["data"].get("format"), str | None):
        table["data"]["format"] = {"name": written}
    stated = config.stated["stages"][stage.name]
    if any(name in {**stated, **stated.get("train", {})} for name in LENGTHS):
        table["train"] = {key: value for key, value in table["train"].items() if key != "max_steps"}
    shared = {key: before[key] for key in ("model", "chat_template", "tuner", "optimizer")}
    return {**shared, "model_kwargs": model_kwargs.inherited(before.get("model_kwargs", {})), **table}


def stage(config: Mapping[str, Any]) -> Stage | None:
    """The stage of a recorded config. None if its plugin is not installed."""
    with contextlib.suppress(AlignkitError):
        registry = Registry()
        in_memory.activate_known(registry, config["plugins"])
        return registry.stage(next(reversed(config["stages"])))
    return None


def kept(config: RunConfig, without: RunConfig) -> list[str]:
    """The recorded settings in ``config``, as text; ``without`` is the config without them. Runs are left out."""
    changes, settings = resume_rules.changes(without.to_dict(), config), config.to_dict()
    return [
        f"{change.name}={change.after}"
        for change in changes
        if _has(settings, change.path) and not (isinstance(change.after, str) and manifest.is_run(Path(change.after)))
    ]


def _has(table: Any, path: Sequence[str]) -> bool:
    """Whether a nested table has a setting. It has none of components that are not selected."""
    for key in path:
        if not isinstance(table, Mapping) or key not in table:
            return False
        table = table[key]
    return True
