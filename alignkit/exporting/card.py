"""The manifest and the model card of an export. No torch here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.runs import card, fingerprints, manifest

FILE = "export.json"


def write(folder: Path, run: Path, record: dict[str, Any], export: Mapping[str, Any]) -> None:
    """Write what ``folder`` was made from. ``record`` is the manifest of the run, ``export`` how it was exported."""
    exported = {
        **{key: record[key] for key in ("stage", "role", "tuner", "model", "stop_ids", "metrics", "config")},
        "run": {"folder": os.path.abspath(run), "weights": record["fingerprints"]["weights"]},
        "base_of_run": record["base"],
        "fingerprints": fingerprints.of(folder),
        "versions": manifest.versions(["alignkit", "torch", "transformers", "peft", "safetensors"]),
        "export": dict(export),
    }
    manifest.write_json(folder / FILE, exported)
    if (run / card.PICTURE).exists():
        shutil.copy(run / card.PICTURE, folder)
    text = card.render({**record, "weights": "model", "export": {"run": str(run), **export}}, folder)
    manifest.write_atomically(folder / "README.md", text)
