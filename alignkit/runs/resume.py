"""Prepares run folders for training, and resumes unfinished and finished runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignkit import paths
from alignkit.config import data_sources, resume_rules
from alignkit.config.resolve import RunConfig
from alignkit.errors import AlignkitError, ConfigError
from alignkit.runs import answers, manifest, record, recorded
from alignkit.runs.plan import Plan
from alignkit.runs.recorded import CONFIG

METRICS = "metrics.jsonl"
TRACKERS = "trackers.json"  # which tracker run continues; the trackers' own files are in the folders below
TRACKER_FOLDERS = ("tensorboard", "wandb")
SURROUNDINGS = Path("checkpoints") / "surroundings.json"
LONGER = Path("checkpoints") / "longer.json"
TRAINED_WEIGHTS = "trained.safetensors"  # in a checkpoint of a stage with several roles
DAY = "the day it began"  # a key of the surroundings
CODE = "the file of "  # how the keys of files of functions begin


def check_folders(plans: Sequence[Plan], resume: bool, overwrite: bool, plan_only: bool = False) -> None:
    """:func:`check_folder` for each run of a :class:`Pipeline`. ``overwrite`` is for the last one, the requested run.

    Raises:
        ConfigError: see :func:`check_folder`; the requested run would replace files that one of the runs uses.
    """
    for plan in plans:
        requested, stage = plans[-1].config.folder, plan.config.stage.component.name
        replaced = [folder.resolve() for folder in (requested, manifest.unfinished(requested)) if folder.exists()]
        for path, what in _used(plan):
            if any(paths.expand(path).resolve().is_relative_to(folder) for folder in replaced):
                raise ConfigError(f"{stage} uses {path}{what}, which this run would replace. Choose another --output")
        check_folder(plan.config, resume, overwrite and plan is plans[-1], plan_only)


def _used(plan: Plan) -> Iterator[tuple[str, str]]:
    """The paths that a run is made from, and what they are if the user has not named them."""
    config = plan.config
    sources = [source.path for source in data_sources.parse(config.data.path)]
    yield from ((path, "") for path in (config.model, config.chat_template, *sources, config.data.eval_path) if path)
    for parent in plan.parents.values():
        if parent.manifest is not None:
            yield str(parent.folder), ""
            if parent.manifest["weights"] == "adapter":
                yield str(parent.manifest["base"]["located"]), f" (the base of {parent.folder})"


def check_folder(config: RunConfig, resume: bool, overwrite: bool, plan_only: bool = False) -> None:
    """Check that a run may use the folder of its config. With ``plan_only``, an unfinished run in it is accepted.

    Raises:
        ConfigError: the folder contains a run, and neither ``resume`` nor ``overwrite`` is set; a resume would change
            settings that it must keep.
    """
    folder, unfinished = config.folder, manifest.unfinished(config.folder)
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ConfigError(f"{parent} is a file. Choose another --output")
    if folder.exists() and not manifest.is_run(folder):
        raise ConfigError(f"{folder} exists and is not a run of alignkit. Choose another --output")
    if overwrite:
        return
    if resume:
        if previous := recorded.previous(config):
            _extensions(previous, config)
        return
    if folder.exists():
        changes = resume_rules.changes(manifest.read(folder)["config"], config)
        extends = any(change.extends for change in changes) and all(change.allowed for change in changes)
        resume_hint = ", add --resume to extend it, " if extends else ", "
        raise ConfigError(
            f"{folder} is a finished run. Choose another --output{resume_hint}or add --overwrite to replace it"
        )
    if unfinished.exists() and not plan_only:
        raise ConfigError(
            f"{folder} has an unfinished run. Add --resume to continue, or start it again with "
            f"alignkit train --plugin {config.stage.component.name} --overwrite"
        )


def prepare_folder(
    plan: Plan, surroundings: dict[str, Any], resume: bool, overwrite: bool, say: Callable[[str], None]
) -> list[str]:
    """Prepare the folder of an unfinished run for training.

    Without ``resume``, a previous attempt is removed. With it, the unfinished run continues; if there is none, a copy
    of the finished run, unless ``overwrite`` replaces it. Incomplete checkpoints, and metrics and answers that were
    written after the last complete one, are removed. ``surroundings`` are facts other than the config that the result
    depends on. The code of a function may change, so that an error in it can be corrected; ``say`` gets a line.

    Returns:
        The settings that extend the run, a line each.

    Raises:
        ConfigError: the config or the surroundings differ from those of the run; a finished run has no checkpoint, or
            would not be extended.
    """
    config, folder, extensions = plan.config, manifest.unfinished(plan.config.folder), list[str]()
    if not resume or not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)
    if resume and (previous := recorded.previous(config)) and not (overwrite and previous == config.folder):
        extensions = _extensions(previous, config)
        before = _surroundings(previous)
        changed = [name for name, value in surroundings.items() if before.get(name, value) != value]
        edited = [name for name in changed if name.startswith(CODE)]
        if refused := [name for name in changed if name not in edited]:
            raise ConfigError(f"changed since the run began: {', '.join(refused)}. Start again with --overwrite")
        for name in edited:
            say(f"warning: {name.removeprefix(CODE)} is in a file that has changed since the run began")
        if previous == config.folder:
            _copy(previous, folder)
        (folder / manifest.FILE).unlink(missing_ok=True)  # left if the run was killed before the rename
        last = last_checkpoint(folder)
        _remove_incomplete(folder)
        answers.keep_until(folder, step_of(last) if last else -1)
        _drop_metrics_after(folder / METRICS, last)
        if (changes := [*extensions, *(f"{name} has changed" for name in edited)]) and last:
            manifest.write_json(
                folder / LONGER, [*past_extensions(folder), {"step": step_of(last), "settings": changes}]
            )
    (folder / SURROUNDINGS).parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(folder / SURROUNDINGS, surroundings)
    manifest.write_atomically(folder / CONFIG, config.to_yaml())
    return extensions


def _remove_incomplete(folder: Path) -> None:
    """Remove what a killed process left: incomplete checkpoints, and hidden files and folders, which are temporary."""
    incomplete = [each for each in folder.glob("checkpoints/checkpoint-*") if not is_complete(each)]
    for each in [*incomplete, *folder.glob(".*"), *folder.glob("checkpoints/.*")]:
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def _extensions(previous: Path, config: RunConfig) -> list[str]:
    """The settings of ``config`` that extend the run in ``previous``, a line each.

    Raises:
        ConfigError: the run cannot continue with these settings.
    """
    changes = resume_rules.changes(recorded.read(previous), config)
    if refused := [str(change) for change in changes if not change.allowed]:
        raise ConfigError(
            f"--resume must keep the settings of the run, but these differ: {', '.join(refused)}. "
            "Undo the changes, or start again with --overwrite"
        )
    extensions = [str(change) for change in changes if change.extends]
    if previous == config.folder and not (extensions and last_checkpoint(previous)):
        reason = "it keeps no checkpoint (train.save_strategy: no)" if extensions else "no setting makes it longer"
        raise ConfigError(f"cannot extend the finished run {previous}: {reason}. To train it again, add --overwrite")
    return extensions


def _copy(final: Path, folder: Path) -> None:
    """Copy what a resume of a finished run needs to ``folder``. The config, which marks it as valid, comes last."""
    shutil.copytree(final / "checkpoints", folder / "checkpoints", copy_function=_link)
    for name in TRACKER_FOLDERS:
        if (final / name).exists():
            shutil.copytree(final / name, folder / name)
    for file in (final / METRICS, final / answers.FILE, final / TRACKERS, final / CONFIG):
        if file.exists():
            shutil.copy2(file, folder)


def _link(source: str, target: str) -> None:
    """Hard-link a file of a checkpoint. These files never change, so two folders can share them."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def past_extensions(folder: Path) -> list[dict[str, Any]]:
    """The steps at which a run was extended, and the settings that extended it."""
    file = folder / LONGER
    return list(record.read(file, record.LONGER)) if file.exists() else []


def _surroundings(folder: Path) -> dict[str, str | None]:
    file = folder / SURROUNDINGS
    return dict(record.read(file, record.SURROUNDINGS)) if file.exists() else {}


def start_day(config: RunConfig) -> str | None:
    """The day on which the run to resume began (``2026-11-25``). None if there is none."""
    previous = recorded.previous(config)
    return _surroundings(previous).get(DAY) if previous else None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(reversed(checkpoints(folder)), None)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(filter(is_complete, folder.glob("checkpoints/checkpoint-*")), key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: the Trainer writes ``trainer_state.json`` last."""
    try:
        return bool(_state(checkpoint)["global_step"] == step_of(checkpoint))
    except (AlignkitError, ValueError):
        return False


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = record.read(checkpoint / "trainer_state.json", record.TRAINER_STATE)
    return state


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def _drop_metrics_after(file: Path, checkpoint: Path | None) -> None:
    """Drop the lines of ``metrics.jsonl`` that were logged after a checkpoint was written; all, if there is none."""
    if not file.exists():
        return
    step, history = -1, list[Any]()
    if checkpoint is not None:
        step = step_of(checkpoint)
        history = [manifest.plain_json(log) for log in _state(checkpoint)["log_history"]]
    content = file.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in content.split("\n") if _logged_by(line, step, history)]
    manifest.write_atomically(file, "".join(line + "\n" for line in lines))


def _logged_by(line: str, step: int, history: list[Any]) -> bool:
    """Whether a line was logged before the checkpoint of ``step``, whose ``history`` has every log.

    A log counts once, and is removed from ``history``: that of an evaluation at the end may equal the last one.
    """
    try:
        log = record.loads(line)
        if log["step"] < step:
            return True
        history.remove(log)
        return True
    except (ValueError, TypeError, KeyError):  # not in the history, or a line that a kill cut off
        return False
