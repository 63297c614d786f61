"""The signals that ask a process to stop: Ctrl-C, and SIGTERM, which schedulers such as Slurm send before SIGKILL."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_replaced: list[dict[signal.Signals, Any]] = []  # the previous handlers, for each call of `handle` that is in effect
_masks: list[set[Any]] = []  # of signals, while this process is forked


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


# A forked process restores the handlers of the operating system at once: a pool ends its processes with SIGTERM, and a
# handler in Python would miss it just before it waits for a lock. Signals that come before that wait until then.


def _before_fork() -> None:
    if _replaced:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork_in_child() -> None:
    while _replaced:
        for each, former in _replaced.pop().items():
            signal.signal(each, former)
    _after_fork()


def _after_fork() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child, after_in_parent=_after_fork)


def status(number: signal.Signals) -> int:
    """The exit status of a command that a signal stopped: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + number
