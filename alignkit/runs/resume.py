"""What is left of an unfinished run, or of a finished one, and how to go on with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from alignkit import yaml
from alignkit.config import RunConfig, identity
from alignkit.errors import ConfigError
from alignkit.runs import manifest
from alignkit.runs.plan import Plan

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SURROUNDINGS = Path("checkpoints") / "surroundings.json"
LONGER = Path("checkpoints") / "longer.json"
DAY = "the day it began"  # in the surroundings


def check_folder(config: RunConfig, resume: bool, overwrite: bool, plan_only: bool = False) -> None:
    """Whether a run may go to the folder of its config. With ``plan_only`` an unfinished run there does no harm.

    Raises:
        ConfigError: a finished run is there, or an unfinished one, and the user said neither; ``resume`` comes with
            settings that it may not change.
    """
    folder, unfinished = config.folder, manifest.unfinished(config.folder)
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file: choose another --output")
    if folder.exists() and not manifest.is_run(folder):
        raise ConfigError(f"{folder} exists and is no run of alignkit. Choose another --output")
    if overwrite:
        return
    if resume:
        if former := _former(config):
            _grown(former, config)
        return
    if folder.exists():
        changes = identity.changes(manifest.read(folder)["config"], config)
        on = any(change.grows for change in changes) and all(change.allowed for change in changes)
        or_on = ", add --resume to train it on, " if on else ", "
        raise ConfigError(
            f"{folder}: a finished run is there. Choose another --output{or_on}or add --overwrite to replace it"
        )
    if unfinished.exists() and not plan_only:
        raise ConfigError(f"{folder}: an unfinished run is there. Add --resume to go on, or --overwrite to start again")


def prepare_folder(plan: Plan, surroundings: dict[str, Any], resume: bool, overwrite: bool) -> list[str]:
    """Make the unfinished run's folder hold exactly what this run may build on.

    Without ``resume`` a former attempt is removed. With it, the unfinished run is gone on with; where there is none,
    a copy of the finished one, unless ``overwrite`` replaces it. Checkpoints that were not completely written and
    metrics logged after the last complete one are dropped. ``surroundings`` is what the outcome depends on beside the
    config. Returns the settings that make the run longer than it was to be, a line each.

    Raises:
        ConfigError: the config or the surroundings are not those that the run began with; a finished run has no
            checkpoint, or would not become longer.
    """
    config, folder, grown = plan.config, manifest.unfinished(plan.config.folder), list[str]()
    if not resume or not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)
    if resume and (former := _former(config)) and not (overwrite and former == config.folder):
        grown = _grown(former, config)
        if (former / SURROUNDINGS).exists():
            before = json.loads((former / SURROUNDINGS).read_text(encoding="utf-8"))
            if gone := [name for name, value in surroundings.items() if before.get(name, value) != value]:
                raise ConfigError(f"changed since the run began: {', '.join(gone)}. Start again with --overwrite")
        if former == config.folder:
            _copy(former, folder)
        (folder / manifest.FILE).unlink(missing_ok=True)  # of a run that was to be renamed
        last = last_checkpoint(folder)
        for checkpoint in folder.glob("checkpoints/checkpoint-*"):
            if not is_complete(checkpoint):
                shutil.rmtree(checkpoint)
        _drop_metrics_after(folder / METRICS, _step(last) if last else -1)
        if grown and last:
            manifest.write_json(folder / LONGER, [*longer_since(folder), {"step": _step(last), "settings": grown}])
    (folder / SURROUNDINGS).parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(folder / SURROUNDINGS, surroundings)
    manifest.write_atomically(folder / CONFIG, config.to_yaml())
    return grown


def _former(config: RunConfig) -> Path | None:
    """The folder of the run that a resume goes on with: the unfinished one, else the finished one."""
    return next((f for f in (manifest.unfinished(config.folder), config.folder) if (f / CONFIG).exists()), None)


def _grown(former: Path, config: RunConfig) -> list[str]:
    """The settings of ``config`` that make the run in ``former`` longer than it was to be, a line each.

    Raises:
        ConfigError: it may not go on with these settings.
    """
    changes = identity.changes(yaml.load(former / CONFIG), config)
    if refused := [str(change) for change in changes if not change.allowed]:
        raise ConfigError(
            f"--resume goes on with the settings that the run began with, and these differ: {', '.join(refused)}. "
            "Take the changes back, or start again with --overwrite"
        )
    grown = [str(change) for change in changes if change.grows]
    if former == config.folder and not (grown and last_checkpoint(former)):
        why = "it keeps no checkpoint (train.save_strategy: no)" if grown else "no setting makes it longer"
        raise ConfigError(f"{former} is finished and cannot be trained on: {why}. --overwrite trains it anew")
    return grown


def _copy(final: Path, folder: Path) -> None:
    """Put what going on from a finished run takes into ``folder``; the config, which makes it valid, comes last."""
    shutil.copytree(final / "checkpoints", folder / "checkpoints", copy_function=_link)
    for file in (final / METRICS, final / CONFIG):
        if file.exists():
            shutil.copy2(file, folder)


def _link(source: str, target: str) -> None:
    """A checkpoint's files are never written again, so that two folders can share them."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def longer_since(folder: Path) -> list[dict[str, Any]]:
    """The steps at which a run was made longer than it was to be, and by which settings."""
    file = folder / LONGER
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def began(config: RunConfig) -> str | None:
    """The day on which the run began that a resume goes on with (``2026-11-25``); None where there is none."""
    former = _former(config)
    if former is None or not (former / SURROUNDINGS).exists():
        return None
    day: str | None = json.loads((former / SURROUNDINGS).read_text(encoding="utf-8")).get(DAY)
    return day


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is completely written."""
    return max(filter(is_complete, folder.glob("checkpoints/checkpoint-*")), key=_step, default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes ``trainer_state.json`` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _drop_metrics_after(file: Path, step: int) -> None:
    if file.exists():
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if _logged_by(line, step)]
        manifest.write_atomically(file, "".join(line + "\n" for line in lines))


def _logged_by(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:  # cut off by the kill
        return False
