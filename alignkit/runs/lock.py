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
        ConfigError: another process holds it.
    """
    from filelock import FileLock, Timeout

    file = folder.with_name(f".{folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another process (pid {_read(file) or 'unknown'}) is training in {folder}. Wait for it, or choose another "
            "--output"
        ) from None
    try:
        file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            file.unlink()
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process of this machine is training in a folder. The lock itself is not touched."""
    pid = _read(folder.with_name(f".{folder.name}.lock"))
    try:
        os.kill(int(pid), 0)  # signal 0 is not sent
    except PermissionError:  # another user's process
        return True
    except (ValueError, OSError):
        return False
    return True


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8")
    return ""
