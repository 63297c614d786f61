"""Builds the wheel, installs it in a fresh environment, and trains with it: ``try_wheel.py FOLDER``.

The environment gets the versions in ``constraints.txt``. The sdist is built first and the wheel from it, as by
``python -m build``. It needs the network and, with torch, about 6 GB of disk space and several minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build(target: Path) -> Path:
    """Build the sdist, and the wheel from the unpacked sdist. Returns the wheel. Needs hatchling."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", target], cwd=ROOT, check=True)
    (sdist,) = target.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    unpacked = target / sdist.name.removesuffix(".tar.gz")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target], cwd=unpacked, check=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder for the environment and the run")
    folder: Path = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True)
    wheel = build(folder / "dist")
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = {**os.environ, "ALIGNKIT_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    for command in (
        ["pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel],
        ["alignkit", "demo"],
        ["alignkit", "train", "--plugin", "sft", "train.max_steps=2"],
        ["alignkit", "chat", "runs/sft", "--prompt", "How do I boil an egg?", "--max-new-tokens", "16"],
    ):
        print("$", *command, flush=True)
        subprocess.run([binaries / str(command[0]), *command[1:]], cwd=folder, env=environment, check=True)
    adapter = folder / "runs" / "sft" / "adapter_model.safetensors"
    print(f"{adapter}: {adapter.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
