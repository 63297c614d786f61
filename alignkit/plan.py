"""What a run will do, resolved and checked before anything is loaded. No torch here."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from alignkit import base, data, manifest
from alignkit.config import RunConfig
from alignkit.data import Located, Rows
from alignkit.errors import ConfigError
from alignkit.registry import Registry


@dataclass(frozen=True)
class Plan:
    """A run that can start: its config, its rows, and where it goes."""

    registry: Registry
    config: RunConfig
    source: Rows
    train_rows: list[Located]
    eval_rows: list[Located]
    eval_source: Rows | None  # only where the config names one

    def describe(self) -> list[tuple[str, str]]:
        """What a person wants to know before it starts, as (label, text)."""
        config, train = self.config, self.config.train
        learning_rate = train.get("learning_rate", 5e-5)
        steps = train.get("max_steps", -1)
        length = f"{steps} steps" if steps > 0 else _count(train.get("num_train_epochs", 3), "epoch")
        batch = train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)
        split = f"{len(self.eval_rows)} rows split off"
        return [
            ("stage", self._named("stage")),
            ("model", config.model),
            ("tuner", self._named("tuner")),
            ("loss", self._named("loss")),
            ("optimizer", f"{self._named('optimizer')}, learning rate {learning_rate:g}"),
            ("data", self.source.describe()),
            ("held out", self.eval_source.describe() if self.eval_source else split),
            ("training", f"{len(self.train_rows)} rows, {length}, batches of {batch}"),
            ("run folder", str(config.folder)),
        ]

    def _named(self, kind: str) -> str:
        component = getattr(self.config, kind).component
        plugin = self.registry.provider(component)
        by = "" if plugin.builtin else f" ({plugin.provider})"
        return f"{component.name}: {component.summary}{by}"


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


def make(registry: Registry, config: RunConfig) -> Plan:
    """Check everything that can be checked without torch, and read the data.

    Raises:
        ConfigError: a package that a component needs is not installed; the base is none.
        DataError: from :mod:`alignkit.data`.
    """
    for component in (s.component for s in (config.stage, config.tuner, config.optimizer, config.loss)):
        for package in component.requires:
            if importlib.util.find_spec(package) is None:
                what = f"{component.kind} '{component.name}' needs {package}, which is not installed"
                raise ConfigError(f"{what}: pip install {package}")
    if config.chat_template is not None and not Path(config.chat_template).expanduser().is_file():
        raise ConfigError(f"chat_template: no file {config.chat_template}")
    base.check(config.model)

    stage = config.stage.component
    if config.data.path is None:
        raise ConfigError(f"stage '{stage.name}' brings no data of its own: add --data")
    source = data.load(registry, config.data, config.data.path, stage.rows)
    if config.data.eval_path is not None:
        held_out = dataclasses.replace(config.data, split=config.data.eval_split or config.data.split)
        if config.data.eval_path == config.data.path and held_out.split == config.data.split:
            raise ConfigError(f"data.eval_path is the training data ({config.data.path}): name data.eval_split too")
        eval_source = data.load(registry, held_out, config.data.eval_path, stage.rows)
        return Plan(registry, config, source, source.rows, eval_source.rows, eval_source)
    train_rows, eval_rows = data.hold_out(source.rows, config.data.eval_size, config.data.seed)
    return Plan(registry, config, source, train_rows, eval_rows, None)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Whether a run may go to ``folder``.

    Raises:
        ConfigError: a finished run is there, or an unfinished one, and the user said neither.
    """
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file: choose another --output")
    if folder.exists() and not manifest.is_run(folder):
        raise ConfigError(f"{folder} exists and is no run of alignkit. Choose another --output")
    if overwrite:
        return
    if folder.exists():
        raise ConfigError(
            f"{folder}: a finished run is there. Choose another --output, or add --overwrite to replace it"
        )
    if manifest.unfinished(folder).exists() and not resume:
        raise ConfigError(f"{folder}: an unfinished run is there. Add --resume to go on, or --overwrite to start again")
