"""Serves a model folder with an OpenAI-compatible API, by a server that another package provides."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from alignkit.errors import AlignkitError, ConfigError

Engine = Literal["transformers", "vllm"]

REQUIRED = ("fastapi", "openai", "pydantic", "uvicorn")  # by `transformers serve`
GRACE = 10.0  # seconds in which a server can finish what it is answering


class Command(NamedTuple):
    """The command that starts a server. It names the model by its folder's name."""

    engine: Engine
    words: list[str]
    folder: Path  # in which it is run

    def __str__(self) -> str:
        """For a shell."""
        return f"cd {shlex.quote(str(self.folder))} && {shlex.join(self.words)}"


def check_installed(engine: Engine) -> None:
    """Check that the server is installed.

    Raises:
        ConfigError: it is not.
    """
    if engine == "vllm" and shutil.which(_program(engine)) is None:
        raise ConfigError("serve --engine vllm: vLLM is not installed: pip install vllm")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None] if engine == "transformers" else []
    if missing:
        raise ConfigError(f"serve needs {missing[0]}, which is not installed: pip install 'alignkit[serve]'")


def command(engine: Engine, model: Path, host: str, port: int, options: Sequence[str]) -> Command:
    """The command that serves the model in a folder under the name of the folder. ``options`` are the server's own."""
    words = [_program(engine), "serve", model.name, "--host", host, "--port", str(port), *options]
    return Command(engine, words, model.parent)


def _program(engine: Engine) -> str:
    """The program of the server, of this Python if it is installed there."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(engine, path=beside) or engine


def run(command: Command, host: str, port: int, log: Path, ready: Callable[[], None]) -> None:
    """Run a server until Ctrl-C or SIGTERM, then end it and all of its processes.

    Args:
        log: the file for what the server prints.
        ready: is called when the server answers.

    Raises:
        AlignkitError: the server ended by itself.
    """
    with log.open("wb") as output, _stop_signals() as stopped:
        process = subprocess.Popen(
            command.words,
            cwd=command.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # only this process gets Ctrl-C, and ends the others
        )
        try:
            is_ready = False
            while process.poll() is None and not stopped:
                if not is_ready and _answers(host, port):
                    is_ready = True
                    ready()
                time.sleep(0.1)
            ended_itself = not stopped
        finally:
            _end(process)
    if ended_itself:
        raise AlignkitError(
            f"{command.engine} serve {'stopped' if is_ready else 'could not start'}: {_reason(log)}. Its output is "
            f"in {log}"
        )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that gets the signals that ask this process to stop."""
    received: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(host: str, port: int) -> bool:
    """Whether the server is ready for requests."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{named(reached)}:{port}/health", timeout=1):
            return True
    except OSError:
        return False


def named(host: str) -> str:
    """The host as it is written in an address."""
    return f"[{host}]" if ":" in host else host


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)


def _reason(log: Path) -> str:
    """The last line of a log that names an error, or else its last line."""
    lines = [" ".join(line.split()) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    written = [line for line in lines if line] or ["it printed nothing"]
    return next((line for line in reversed(written) if re.search("error", line, re.I)), written[-1]).rstrip(".")
