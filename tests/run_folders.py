"""What tests read from run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "alignkit.json").read_text()))
