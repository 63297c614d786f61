"""Run folders: the manifest, and atomic writes.

A run trains in ``runs/sft.unfinished``. When it is finished, the folder is renamed to ``runs/sft``. So a folder without
that suffix is a complete run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignkit import paths
from alignkit.errors import AlignkitError
from alignkit.runs import record

FILE = "alignkit.json"
VERSION = 2


def unfinished(folder: Path) -> Path:
    """The folder of a run until it is finished."""
    folder = paths.named(folder)
    return folder.with_name(folder.name + ".unfinished")


def is_run(folder: Path) -> bool:
    """Whether a folder is a finished run."""
    return (folder / FILE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        AlignkitError: it cannot be read, another version wrote it, a value has another type than alignkit writes, or
            the folder contains a pipe or a device. A missing key is an error when it is read.
    """
    record.check_files(folder)
    try:
        manifest = record.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignkitError(f"cannot read {folder / FILE}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("manifest_version") != VERSION:
        raise AlignkitError(f"{folder} was written by an incompatible version of alignkit")
    return record.checked(manifest, record.MANIFEST, folder / FILE)


def missing_file(folder: Path) -> str | None:
    """The file that a folder lacks to be loaded by PEFT or Transformers. None if it is complete."""
    stem = "adapter" if (folder / "adapter_config.json").exists() else "model"
    if stem == "model" and not (folder / "config.json").exists():
        return "config.json or adapter_config.json"
    beside = "adapter_config.json" if stem == "adapter" else "config.json"
    return None if any(folder.glob("*model*.safetensors")) else f"weights in safetensors beside {beside}"


def write_atomically(file: Path, content: str) -> None:
    """Write a text file atomically: it is complete, or it does not appear."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as stream:  # does not follow a link that someone put there
        stream.write(content)
    os.replace(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(file, json.dumps(plain_json(content), indent=2, ensure_ascii=False) + "\n")


def plain_json(content: Any) -> Any:
    """``content`` for JSON: None instead of NaN and infinity, plain numbers instead of NumPy and torch scalars."""
    if isinstance(content, dict):
        return {key: plain_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain_json(value) for value in content]
    if hasattr(content, "tolist"):  # scalars and arrays of NumPy and torch, in the metrics of plugins
        return plain_json(content.tolist())
    return None if isinstance(content, float) and not math.isfinite(content) else content


def finish(folder: Path) -> None:
    """Rename the folder of an unfinished run, and replace a previous run (with ``--overwrite``)."""
    if folder.exists():
        remove_former(folder)
        os.rename(folder, _former(folder))
    os.rename(unfinished(folder), folder)
    remove_former(folder)


def remove_former(folder: Path) -> None:
    """Remove the run that a finished one has replaced, if a process was killed while it did so."""
    shutil.rmtree(_former(folder), ignore_errors=True)


def _former(folder: Path) -> Path:
    return folder.with_name(folder.name + ".former.unfinished")


def versions(distributions: list[str]) -> dict[str, str]:
    """The versions of the distributions that are installed."""
    result = {}
    for name in dict.fromkeys(distributions):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result
