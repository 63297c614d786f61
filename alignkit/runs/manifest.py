"""Run folders: the manifest, and files that appear whole or not at all.

While a run trains it lives in ``runs/sft.unfinished``; the last step is one rename to ``runs/sft``. So a folder without
that ending is a finished run, whole. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError

FILE = "alignkit.json"
VERSION = 2


def unfinished(folder: Path) -> Path:
    """Where a run lives until it is finished."""
    return folder.with_name(folder.name + ".unfinished")


def is_run(folder: Path) -> bool:
    """Whether a folder is a finished run."""
    return (folder / FILE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignkitError(f"{folder / FILE} cannot be read: {error}") from None
    if manifest.get("manifest_version") != VERSION:
        raise AlignkitError(f"{folder} was written by another version of alignkit")
    return dict(manifest)


def lacks(folder: Path) -> str | None:
    """What is missing from a folder for PEFT or Transformers to open its model; None where nothing is."""
    stem = "adapter" if (folder / "adapter_config.json").exists() else "model"
    if stem == "model" and not (folder / "config.json").exists():
        return "config.json or adapter_config.json"
    weights = [name for kind in ("safetensors", "bin") for name in folder.glob(f"*model*.{kind}")]
    return None if weights else f"weights beside {'adapter_config' if stem == 'adapter' else 'config'}.json"


def write_atomically(file: Path, content: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, file)


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that it is there whole or not at all."""
    write_atomically(file, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def finite(content: Any) -> Any:
    """``content`` as JSON can hold it: None for every NaN and infinity, plain numbers for NumPy's and torch's."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if hasattr(content, "tolist"):  # NumPy's and torch's scalars and arrays, in the metrics of a plugin
        return finite(content.tolist())
    return None if isinstance(content, float) and not math.isfinite(content) else content


def finish(folder: Path) -> None:
    """Make the unfinished run the run, in place of a former one (which ``--overwrite`` allowed)."""
    former = folder.with_name(folder.name + ".former.unfinished")
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(folder, former)
    os.rename(unfinished(folder), folder)
    shutil.rmtree(former, ignore_errors=True)


def versions(distributions: list[str]) -> dict[str, str]:
    """The installed version of each distribution; those that are not installed are left out."""
    found = {}
    for name in dict.fromkeys(distributions):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
