"""Trains the runs of a sweep, each by ``alignkit train`` in a process of its own, so that none can stop the others.

The process is in a session of its own: Ctrl-C reaches only the sweep, which passes it on once. If the sweep is killed,
the process trains on, and the next sweep waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.runs import lock, manifest
from alignkit.runs.sweep import Job, Sweep

ERROR = "alignkit: error: "  # how the last line of a command that failed begins

Report = Callable[[Job], None]


class StoppedError(Exception):
    """The user pressed Ctrl-C. The run that was being trained has a checkpoint, if it had begun to train."""


def train(sweep: Sweep, say: Callable[[str], None], report: Report) -> None:
    """Train the runs that are not finished, one after another.

    Args:
        sweep: the plan; the state of each run is set in it, and written to ``sweep.jsonl``.
        say: prints a line for the user.
        report: called when a run begins to train, and when it has ended.

    Raises:
        StoppedError: the user pressed Ctrl-C.
    """
    failed = set[Path]()
    sweep.output.mkdir(parents=True, exist_ok=True)
    with lock.held(sweep.output):
        for job in sweep.jobs:
            job.state = "finished" if job.is_finished else "waiting"
        for job in [*sweep.parents, *sweep.jobs]:
            if missing := [folder for folder in job.needs if folder in failed]:
                job.state, job.error = "failed", f"it starts from {missing[0]}, which failed"
                report(job)
            elif job.state != "finished":
                _train(sweep, job, say, report)
            if job.state == "failed":
                failed.add(job.folder)
            sweep.write()


def _train(sweep: Sweep, job: Job, say: Callable[[str], None], report: Report) -> None:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_atomically(job.config_file, job.config.to_yaml())
    started = time.monotonic()
    while True:
        _wait_for_another_process(job, say)
        if job.is_finished:  # by that process
            job.error = None
            break
        job.state = "training"
        report(job)
        sweep.write()
        try:
            job.error = _run(job, say)
        except StoppedError:
            job.state = "finished" if job.is_finished else "waiting"
            sweep.write()
            raise
        if not (job.error and _is_locked(job)):  # else another process was still starting, and took the folder first
            break
    job.seconds = time.monotonic() - started
    job.state = "failed" if job.error else "finished"
    report(job)


def _wait_for_another_process(job: Job, say: Callable[[str], None]) -> None:
    """Wait while another process trains in the run's folder: that of a sweep that was killed."""
    if _is_locked(job):
        say(f"waiting for a process that trains in {job.folder}; an earlier sweep may have started it")
    while _is_locked(job):
        time.sleep(1)


def _is_locked(job: Job) -> bool:
    try:
        with lock.held(manifest.unfinished(job.folder)):
            return False
    except ConfigError:
        return True


def arguments_of(job: Job) -> list[str]:
    """The arguments of the command that trains a run. The sweep has checked whether its config may run code."""
    return ["train", "-c", str(job.config_file), "--resume", "--trust"]


def _run(job: Job, say: Callable[[str], None]) -> str | None:
    """Train a run in a process, and return why it failed, or None.

    Raises:
        StoppedError: the user pressed Ctrl-C.
    """
    command = [sys.executable, "-P", "-m", "alignkit", *arguments_of(job)]
    with job.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        is_stopped = False
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                if os.name != "nt":  # Windows has no sessions: Ctrl-C has reached the process too
                    process.send_signal(signal.SIGINT)
                say(
                    "stopping now" if is_stopped else "stopping after this step; press Ctrl-C again to stop immediately"
                )
                is_stopped = True
    if is_stopped:
        raise StoppedError
    return _reason(job.log, start, status) if status else None


def _reason(log: Path, start: int, status: int) -> str:
    """Why a process failed, from what it has printed since ``start``, and from its exit status."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").splitlines()
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if errors:
        return errors[-1]
    if status < 0:
        killed = f"killed by {signal.Signals(-status).name}"
        return f"{killed}, perhaps because memory ran out" if -status == signal.SIGKILL else killed
    return f"exit status {status}"
