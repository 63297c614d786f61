"""Commands in processes of their own, which need not import PyTorch again: they are forked from one that has.

The process to fork from is Python's "forkserver". It has imported libraries, but nothing of alignkit.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the other check starts CUDA, which no fork may then use
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["torch", "torch.distributed", "transformers.trainer", "peft", "trl", "datasets"])


class Process:
    """``alignkit`` with these arguments, started in the current folder."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="process-"))
        self._process = _FORK.Process(target=_run, args=(arguments, dict(os.environ), Path.cwd(), self._folder))
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and get what it printed."""
        self._process.join()
        assert self._process.exitcode is not None
        printed = [(self._folder / name).read_text("utf-8") for name in ("out", "err")]
        shutil.rmtree(self._folder)
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *printed)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``alignkit`` with these arguments to its end."""
    return Process(*arguments).wait()


def _run(arguments: tuple[str, ...], env: dict[str, str], here: Path, folder: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(here)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["alignkit", *arguments]
    from alignkit import cli

    cli.run()
