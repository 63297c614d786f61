"""What tests read from run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def record(folder: Path) -> dict[str, Any]:
    """The manifest."""
    return dict(json.loads((folder / "alignkit.json").read_text()))


def logged(folder: Path, name: str) -> list[float]:
    """The values of a metric, as they were logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
