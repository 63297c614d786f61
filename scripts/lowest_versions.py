"""Runs tests with the lowest versions that ``pyproject.toml`` allows: ``lowest_versions.py FOLDER [TESTS ...]``.

Makes an environment in FOLDER with the lowest version of each dependency and extra, and the newest allowed versions of
what these depend on. An environment that is there is used again. It needs the network and about 6 GB of disk space.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = ("demo", "label", "openai", "plot", "qlora")
PLUGINS = ("sft", "rm", "dpo_references", "optimizers")  # these fail with libraries that do not fit together
TESTS = (
    *("tests/core", "tests/test_cli.py", "tests/test_runs.py", "tests/test_resume.py"),
    *(f"tests/plugins/test_{name}.py" for name in PLUGINS),
)


def lowest(requirement: str) -> str | None:
    """``"torch==2.8"`` for ``"torch>=2.8"``; None for a requirement without a lowest version."""
    parsed = Requirement(requirement)
    floors = [each.version for each in parsed.specifier if each.operator == ">="]
    return f"{parsed.name}=={floors[0]}" if floors else None


def pins() -> list[str]:
    """The lowest version of every dependency, of the extras in :data:`EXTRAS`, and of pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(each for name in EXTRAS for each in extras[name])]
    requirements += [each for each in extras["dev"] if Requirement(each).name in ("hypothesis", "pytest")]
    return [pin for each in requirements if (pin := lowest(each))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the environment")
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="arguments of pytest")
    parsed = parser.parse_args()
    python = parsed.folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(parsed.folder, with_pip=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")])}
    print(*pins(), sep="\n", flush=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *pins()], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
    # old versions use what newer versions of others deprecate
    ignored = [word for kind in ("Deprecation", "Future") for word in ("-W", f"ignore::{kind}Warning")]
    command = [python, "-m", "pytest", "-q", *ignored, *parsed.tests]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
