"""The signals that ask a process to stop: Ctrl-C, and SIGTERM, which schedulers such as Slurm send before SIGKILL."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handle(handler: Callable[[signal.Signals], None], *signals: signal.Signals) -> Callable[[], None]:
    """Call ``handler`` for these signals. Outside the main thread, which alone can do this, nothing changes.

    Processes that are forked afterwards, such as those of a ``multiprocessing.Pool``, keep the previous handlers: a
    pool ends them with SIGTERM.

    Returns:
        A function that restores the previous handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    process = os.getpid()

    def received(number: int, frame: object) -> None:
        if os.getpid() == process:
            handler(signal.Signals(number))
        else:
            restore()
            signal.raise_signal(number)

    previous = {each: signal.signal(each, received) for each in signals}

    def restore() -> None:
        for each, former in previous.items():
            signal.signal(each, former)

    return restore


def status(number: signal.Signals) -> int:
    """The exit status of a command that a signal stopped: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + number
