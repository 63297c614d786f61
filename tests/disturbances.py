"""What happens to a run other than a kill: a full disk, read-only folders, a clock that jumps, a second process.

Each function trains a run under one of these, resumes it where that stopped it, and returns what went wrong: the
result must be that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torturing import Ended, Moment, command, differences

REASONS = (
    *("No space left on device", "File too large", "Read-only file system", "Permission denied"),
    *("free some space", "PyTorch could not save a file"),
)


def full_disk(given: list[str], folder: Path, whole: Path, ended: Ended, draw: random.Random) -> list[str]:
    """A run whose disk is full at some moment, up to twice; it is resumed when there is space again."""
    needed = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    faults, flags = list[str](), list[str]()
    with _small_disk(folder) as limited:
        for space in sorted(draw.uniform(0.02, 1.0) * needed for _ in range(draw.randint(1, 2))):
            stopped = limited(int(space), [*given, *flags])
            if not stopped.status:
                return faults + differences(whole / "runs", folder / "runs")
            faults += _faults_of_error(stopped)
            faults += ["a run is half-written"] if any(_finished(folder)) else []
            flags = ["--resume"]
        return faults + _end(limited(None, [*given, *flags]), whole, folder)


def read_only(given: list[str], folder: Path, whole: Path, ended: Ended, draw: random.Random) -> list[str]:
    """A killed run whose folder is read-only when it is resumed first; nothing may change. Then it is writable."""
    faults = list[str]()
    moment = Moment(0.0, draw.randint(1, ended.operations))
    command(given, folder, moment)
    before = _contents(folder)
    with _unwritable(folder) as check:
        stopped = command([*given, "--resume"], folder) if check else None
    if stopped:
        if stopped.status or not any(_finished(folder)):  # it may have been killed after the end
            faults += _faults_of_error(stopped)
        faults += ["files changed in a read-only folder"] if _contents(folder) != before else []
    return faults + _end(command([*given, "--resume"], folder), whole, folder)


def jumping_clock(given: list[str], folder: Path, whole: Path, ended: Ended, draw: random.Random) -> list[str]:
    """A run whose clock jumps by up to ten years, and a kill, after which the files have random times."""
    seeds = draw.randint(0, 2**32), draw.randint(0, 2**32)
    command(given, folder, Moment(0.0, draw.randint(1, ended.operations)), before=lambda: _jump(seeds[0]))
    for file in folder.rglob("*"):
        moment = draw.uniform(0, 2e9)
        with contextlib.suppress(FileNotFoundError):
            os.utime(file, (moment, moment), follow_symlinks=False)
    return _end(command([*given, "--resume"], folder, before=lambda: _jump(seeds[1])), whole, folder)


def second_process(given: list[str], folder: Path, whole: Path, ended: Ended, draw: random.Random) -> list[str]:
    """A run during which commands are run on its folder in a second process, while the first one stands still."""
    faults = list[str]()
    stage = given[given.index("--plugin") + 1]
    others = [
        *([*given, "--resume"], [*given, "--overwrite"], ["runs", "runs"], ["clean", "runs", "--yes", "--unfinished"]),
        *(["watch", f"runs/{stage}"], ["report", "runs", "--output", "../report.html"]),
    ]
    draw.shuffle(others)

    def disturb(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        is_training = (folder / "runs" / f"{stage}.unfinished" / "config.yaml").exists()
        for words in others[:2] if is_training else []:
            second = command(words, folder)
            if words[0] == "train":
                faults.extend(_faults_of_error(second, ["another process"]) if second.status else ["trained twice"])
            elif second.status:
                faults.append(f"{words[0]} ends with status {second.status}: {second.output.strip()[-300:]}")
        os.kill(pid, signal.SIGCONT)

    moment = Moment(0.001, draw.randint(ended.operations // 4, ended.operations))
    first = command(given, folder, moment, at_moment=disturb)
    return faults + _end(first, whole, folder)


DISTURBANCES = {
    "full-disk": full_disk,
    "read-only": read_only,
    "clock": jumping_clock,
    "second-process": second_process,
}


def _end(ended: Ended, whole: Path, folder: Path) -> list[str]:
    """How the last command ended, and how its run differs from the undisturbed one."""
    if ended.status:
        return [f"exit status {ended.status}: {ended.output.strip()[-400:]}"]
    return differences(whole / "runs", folder / "runs")


def _finished(folder: Path) -> Iterator[Path]:
    return (each for each in (folder / "runs").glob("*") if each.is_dir() and not each.name.endswith(".unfinished"))


def _faults_of_error(ended: Ended, reasons: list[str] | tuple[str, ...] = REASONS) -> list[str]:
    """An error is one line with the reason, and status 2."""
    lines = ended.output.strip().splitlines() or [""]
    is_line = lines[-1].startswith("alignkit: error: ") and any(reason in lines[-1] for reason in reasons)
    if ended.status == 2 and is_line and "unexpected" not in lines[-1] and "Traceback" not in ended.output:
        return []
    return [f"status {ended.status}: {ended.output.strip()[-500:]}"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _jump(seed: int) -> None:
    """Make ``time.time`` of this process jump from call to call."""
    draw, real = random.Random(seed), time.time
    time.time = lambda: real() + draw.uniform(-1, 1) * 3e8


# --- disks -----------------------------------------------------------------------------------------------------------


def _mounts(*arguments: str) -> bool:
    done = subprocess.run(arguments, capture_output=True)
    return done.returncode == 0


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[int | None, list[str]], Ended]]:
    """Commands in ``folder`` with so many bytes of space: on a disk of that size, or without root, in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and _mounts("mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder))

    def limited(space: int | None, words: list[str]) -> Ended:
        if mounted:
            size = f"{space // 1024 + 1}k" if space is not None else "1g"
            subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True, capture_output=True)
            return command(words, folder)
        soft = resource.RLIM_INFINITY if space is None else space // 8
        return command(words, folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, soft)))

    try:
        yield limited
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def _unwritable(folder: Path) -> Iterator[bool]:
    """A folder that is read-only meanwhile; False if this machine cannot do it."""
    if os.geteuid():
        folders = [folder, *(each for each in folder.rglob("*") if each.is_dir())]
        for each in folders:
            each.chmod(0o555)
        try:
            yield True
        finally:
            for each in folders:
                each.chmod(0o755)
        return
    can = _mounts("mount", "--bind", str(folder), str(folder))
    if can and not _mounts("mount", "-o", "remount,bind,ro", str(folder)):
        subprocess.run(["umount", str(folder)], check=True)
        can = False
    try:
        yield can
    finally:
        if can:
            subprocess.run(["umount", str(folder)], check=True)
