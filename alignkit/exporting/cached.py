"""Exports in alignkit's cache, made when they are first needed and again when their run has changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit import __version__, bundled
from alignkit.runs import fingerprints, manifest

RECORD = "export.json"  # beside an export: what it was made from, and what it consists of


def cached(run: Path, dtype: str, say: Callable[[str], None]) -> Path:
    """The folder of the export of a run. It is used again if neither the run nor the export has changed.

    The cache holds one export per run, in a folder that is named after the run without the characters that servers
    treat specially.

    Raises:
        AlignkitError: the run cannot be exported.
    """
    from filelock import FileLock

    place = bundled.cache() / "exports" / hashlib.sha256(os.path.abspath(run).encode()).hexdigest()[:12]
    folder = place / re.sub(r"[^\w.-]", "-", os.path.basename(os.path.abspath(run)))
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # another process may export the same run
        source = {
            "run": fingerprints.of(run),
            "manifest": fingerprints.text((run / manifest.FILE).read_text(encoding="utf-8")),
            "dtype": dtype,
            "alignkit": __version__,
        }
        if _read(place / RECORD) != {**source, "export": fingerprints.of(folder)}:
            _export(run, folder, dtype, say)
            manifest.write_json(place / RECORD, {**source, "export": fingerprints.of(folder)})
    return folder


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _export(run: Path, folder: Path, dtype: str, say: Callable[[str], None]) -> None:
    from alignkit.exporting.writing import export

    for former in folder.parent.glob("*/"):  # also what an interrupted export has left
        shutil.rmtree(former)
    say(f"exporting {run} to {folder} (only once, until the run changes)")
    export(run, folder, dtype=dtype, say=say)
    sample_by_default(folder)


def sample_by_default(folder: Path) -> None:
    """Let requests without sampling settings sample from the policy's own distribution.

    ``transformers serve`` ignores the temperature of a request if the generation config of the model does not sample.
    The settings of one that does are kept.
    """
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not settings.get("do_sample"):
        manifest.write_json(file, {**settings, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})
