"""The run that is exported: what is checked before anything is loaded. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, ConfigError
from alignkit.runs import base, fingerprints, lineage, manifest

ROLES = ("policy", "reward")


def read(folder: Path, command: str = "export") -> dict[str, Any]:
    """The manifest of a run that can be exported. ``command`` is named in errors.

    Raises:
        AlignkitError: it is not finished, has neither a policy nor a reward model, has changed, or cannot be merged; or
            its base is gone or has changed.
    """
    continued = not manifest.is_run(folder) and manifest.unfinished(folder).is_dir()
    if continued or folder.name.endswith(".unfinished"):
        raise ConfigError(f"{command}: {folder} is not finished. `alignkit runs` shows the command that continues it")
    role = manifest.read(folder)["role"] if manifest.is_run(folder) else ROLES[0]
    if role not in ROLES:
        stage = manifest.read(folder)["stage"]
        raise ConfigError(
            f"{command}: {folder} is a {role} (stage {stage}). Policies and reward models can be exported"
        )
    record = lineage.named(command, str(folder), role).manifest
    assert record is not None
    if fingerprints.weights(folder) != record["fingerprints"]["weights"]:
        raise AlignkitError(f"{command}: the weights in {folder} have changed since it was trained, or are gone")
    if record["weights"] == "adapter":
        _check_tuner(command, folder, record)
        base.of_run(record, folder, print)
    return record


def _check_tuner(command: str, folder: Path, record: dict[str, Any]) -> None:
    tuner = lineage.tuner(record).component
    if tuner.trains == "inputs":
        raise ConfigError(
            f"{command}: {folder} was trained with tuner '{tuner.name}', whose trained inputs cannot be merged into "
            "weights. Load it with PEFT: its model card shows how"
        )
