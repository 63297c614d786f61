"""Trains with DeepSpeed on the CPU: ``test_deepspeed.py [ARGUMENTS OF PYTEST ...]``.

DeepSpeed is installed in a temporary environment, which sees the packages of the one that runs this script. It needs
the network, a C++ compiler, and about ten minutes on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEEPSPEED = "deepspeed==0.19.8"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder) / ("Scripts" if os.name == "nt" else "bin")
        python = binaries / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
        (site / "running.pth").write_text(sysconfig.get_path("purelib"))
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "DS_BUILD_OPS": "0",  # of its C++ operations only that for communication is needed, and built on first use
            "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]]),  # of ninja, which builds it
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
        }
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, "setuptools>=70.1"], check=True)  # with wheel's command, for the next
        subprocess.run([*install, "--no-build-isolation", DEEPSPEED], check=True, env=environment)
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/live_deepspeed.py", *sys.argv[1:]]
        sys.exit(subprocess.run(tests, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
