"""What is left of an unfinished run, and how to go on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from alignkit import manifest, yaml
from alignkit.errors import ConfigError
from alignkit.plan import Plan

CONFIG = "config.yaml"
SURROUNDINGS = Path("checkpoints") / "surroundings.json"


def prepare_folder(folder: Path, plan: Plan, surroundings: dict[str, Any], resume: bool) -> None:
    """Make the unfinished run's folder hold exactly what this run may build on.

    Without ``resume`` a former attempt is removed. With it, checkpoints that were not completely written and metrics
    logged after the last complete one are dropped. ``surroundings`` is what the outcome depends on beside the config.

    Raises:
        ConfigError: the config or the surroundings are not those that the run began with.
    """
    text = plan.config.to_yaml()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    elif (folder / CONFIG).exists():
        changed = list(_differences(yaml.load(folder / CONFIG), yaml.loads(text, CONFIG), ""))
        if changed:
            raise ConfigError(
                f"--resume goes on with the settings that the run began with, and these differ: {', '.join(changed)}. "
                "Take the changes back, or start again with --overwrite"
            )
        if (folder / SURROUNDINGS).exists():
            former = json.loads((folder / SURROUNDINGS).read_text(encoding="utf-8"))
            if gone := [name for name, value in surroundings.items() if former.get(name) != value]:
                raise ConfigError(f"changed since the run began: {', '.join(gone)}. Start again with --overwrite")
        last = last_checkpoint(folder)
        for checkpoint in folder.glob("checkpoints/checkpoint-*"):
            if not is_complete(checkpoint):
                shutil.rmtree(checkpoint)
        _drop_metrics_after(folder / "metrics.jsonl", _step(last) if last else -1)
    (folder / SURROUNDINGS).parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(folder / SURROUNDINGS, surroundings)
    manifest.write_atomically(folder / CONFIG, text)


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


def _differences(a: Any, b: Any, where: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)]
    return [] if a == b else [f"{where.removeprefix('stages.')} was {a!r}, is {b!r}"]
