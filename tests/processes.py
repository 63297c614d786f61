"""Commands in processes of their own, which need not import PyTorch again: they are forked from one that has.

The process to fork from is Python's "forkserver". It has imported libraries, but nothing of alignkit.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import itertools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as alignkit sets it before it imports torch
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the other check starts CUDA, which no fork may then use
LONGEST = 600  # seconds that a command may take; none takes a fifth of it
NO_PICTURES = "ALIGNKIT_TEST_NO_PICTURES"  # an environment variable: commands draw no curves
_run_new = subprocess.run
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["torch", "torch.distributed", "transformers.trainer", "peft", "trl", "datasets"])


class Process:
    """``alignkit`` with these arguments, or a script of Python, started in the current folder."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None, script: Path | None = None) -> None:
        self.arguments = arguments
        self.store: TCPStore | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="process-"))
        environment = dict(os.environ if env is None else env)
        self._process = _FORK.Process(target=_run, args=(arguments, environment, Path.cwd(), self._folder, script))
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and get what it printed. One that hangs is ended; what it printed shows where it was."""
        self._process.join(LONGEST + 10)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        status = self._process.exitcode
        assert status is not None
        self._process.close()
        printed = [(self._folder / name).read_text("utf-8") for name in ("out", "err")]
        shutil.rmtree(self._folder)
        return subprocess.CompletedProcess(self.arguments, status, *printed)


def run(
    *arguments: str, env: Mapping[str, str] | None = None, script: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``alignkit`` with these arguments, or a script of Python, to its end."""
    return Process(*arguments, env=env, script=script).wait()


def forked(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stand in for ``subprocess.run``: alignkit and scripts of Python are forked, also those of ``torchrun``."""
    match [str(word) for word in command]:
        case [sys.executable, "-m", "alignkit", *arguments]:
            done = run(*arguments, env=options.get("env"))
        case [sys.executable, "-m", "torch.distributed.run", "--standalone", number, script, *arguments]:
            environment = {**os.environ, **(options.get("env") or {})}
            done = run_several(int(number.partition("=")[2]), *arguments, env=environment, script=Path(script))
        case [sys.executable, script, *arguments] if script.endswith(".py"):
            done = run(*arguments, env=options.get("env"), script=Path(script))
        case _:
            return _run_new(command, **options)
    if isinstance(output := options.get("stdout"), io.TextIOBase):
        output.write(done.stdout + done.stderr)
    if options.get("check"):
        done.check_returncode()
    return done


def start_several(number: int, *arguments: str, env: Mapping[str, str], script: Path | None = None) -> list[Process]:
    """Start ``alignkit``, or a script of Python, in so many processes as ``torchrun`` does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port; they all meet here
    shared = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    ranks = ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number))
    running = [Process(*arguments, env=rank, script=script) for rank in ranks]
    for process in running:
        process.store = store  # open as long as one of them is
    return running


def run_several(
    number: int, *arguments: str, env: Mapping[str, str], script: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``alignkit``, or a script of Python, in so many processes to their end.

    Returns what the first printed, or the one that failed.
    """
    running = start_several(number, *arguments, env=env, script=script)
    end = time.monotonic() + LONGEST + 10
    while None in (states := [process.poll() for process in running]):
        if any(states) or time.monotonic() > end:  # the others would wait for it
            for process in itertools.compress(running, (state is None for state in states)):
                process.send_signal(9)
            break
        time.sleep(0.05)
    ended = [process.wait() for process in running]
    return next((done for done in ended if done.returncode > 0), ended[0])


def _run(arguments: tuple[str, ...], env: dict[str, str], here: Path, folder: Path, script: Path | None) -> None:
    gc.freeze()  # libraries are no garbage
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    faulthandler.dump_traceback_later(LONGEST, file=2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(here)
    if cache := env.get("HF_DATASETS_CACHE"):  # the library has read it before the fork
        import datasets.config

        datasets.config.HF_DATASETS_CACHE = Path(cache)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if env.get(NO_PICTURES):
        from alignkit.runs import curves

        curves.can_draw = lambda: False
    sys.argv = [str(script or "alignkit"), *arguments]
    if script:
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    else:
        from alignkit import cli

        cli.run()
