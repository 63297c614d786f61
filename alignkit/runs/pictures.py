"""The style of pictures, and writing them. Needs matplotlib. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "alignkit", "font.size": 9}  # text stays text; same content, same file


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save(figure: Any, file: Path) -> None:
    """Write a figure atomically, as an SVG or a PNG according to the name of the file."""
    unfinished, kind = file.with_name(f".{file.name}"), file.suffix[1:]
    figure.savefig(unfinished, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    unfinished.replace(file)
