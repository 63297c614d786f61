"""Checks of a folder with weights before it is opened: run folders may come from someone else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.runs import record

CODE = ("auto_map", "megatron_config", "trust_remote_code")  # keys of an adapter's config with which libraries run code


def check(folder: Path) -> None:
    """Check that opening the weights in a run folder or a checkpoint runs no code.

    They must be in safetensors, which alignkit and its plugins write. Other formats are pickles. The config of an
    adapter must name no code.

    Raises:
        AlignkitError: the weights are pickles or damaged, or the config of the adapter names code.
    """
    from safetensors import SafetensorError, safe_open

    config = folder / "adapter_config.json"
    pattern = "adapter_model.safetensors" if config.exists() else "*.safetensors"
    if not any(folder.glob(pattern)):
        raise AlignkitError(f"{folder} has no weights in safetensors. alignkit opens no pickles, which can run code")
    for file in folder.glob(pattern):
        try:
            with safe_open(file, "np"):  # reads the header
                pass
        except (OSError, SafetensorError) as error:
            raise AlignkitError(f"cannot read {file}: {error}") from None
    if config.exists():
        try:
            settings = record.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AlignkitError(f"cannot read {config}: {error}") from None
        if named := next((key for key, value in _settings(settings) if key in CODE and value), None):
            raise AlignkitError(f"{config} sets {named}, which makes libraries run code. alignkit writes no such file")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _settings(inner)
