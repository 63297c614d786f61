"""The signals that ask a process to stop: Ctrl-C, and SIGTERM, which schedulers such as Slurm send before SIGKILL."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_replaced: list[dict[signal.Signals, Any]] = []  # the previous handlers, for each call of `handle` that is in effect


def handle(handler: Callable[[signal.Signals], None], *signals: signal.Signals) -> Callable[[], None]:
    """Call ``handler`` for these signals. Outside the main thread, which alone can do this, nothing changes.

    Processes that are forked meanwhile, such as those of a ``multiprocessing.Pool``, have the previous handlers.

    Returns:
        A function that restores the previous handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    previous = {each: signal.signal(each, lambda number, frame: handler(signal.Signals(number))) for each in signals}
    _replaced.append(previous)

    def restore() -> None:
        _replaced[:] = [each for each in _replaced if each is not previous]
        for each, former in previous.items():
            signal.signal(each, former)

    return restore


def _restore_after_fork() -> None:
    """Restore the handlers of the operating system in a forked process.

    A pool ends its processes with SIGTERM. A handler in Python would miss it just before it waits for a lock, and the
    pool would wait for ever.
    """
    while _replaced:
        for each, former in _replaced.pop().items():
            signal.signal(each, former)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_after_fork)


def status(number: signal.Signals) -> int:
    """The exit status of a command that a signal stopped: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + number
