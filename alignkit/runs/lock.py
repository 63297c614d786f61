"""A lock that lets only one process train in a run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from alignkit.errors import ConfigError


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, a hidden file beside it. The operating system releases it if the process is killed.

    Raises:
        ConfigError: another process holds it, or its file is a link.
    """
    from filelock import FileLock, Timeout

    file = folder.with_name(f".{folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink():
        raise ConfigError(f"{file} is a link, and taking the lock would overwrite its target: remove it")
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another process (pid {_read(file) or 'unknown'}) is training in {folder}. Wait for it, or choose another "
            "--output"
        ) from None
    try:
        with contextlib.suppress(PermissionError):  # Windows does not write to a locked file
            file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            file.unlink()
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process of this machine is training in a folder. The lock itself is not touched."""
    import psutil

    try:
        file = folder.with_name(f".{folder.name}.lock")
        pid = int(file.read_text(encoding="utf-8")) if file.is_file() else -1
        return bool(psutil.pid_exists(pid))  # os.kill(pid, 0) would send Ctrl-C on Windows
    except PermissionError:  # Windows does not read a locked file
        return True
    except (ValueError, OSError, OverflowError):
        return False


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8")
    return ""
