"""SIGTERM stops a command as Ctrl-C does, with exit status 143."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import typer

from alignkit.cli.processes import LAUNCHED
from alignkit.runs import stopping


@contextlib.contextmanager
def on_sigterm(advice: str) -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM, so that what the command was doing is cleaned up.

    ``advice`` is how to continue, for a command that does not handle the interrupt itself.

    Raises:
        typer.Exit: the command has stopped.
    """
    received = list[signal.Signals]()

    def interrupt(number: signal.Signals) -> None:
        received.append(number)
        raise KeyboardInterrupt

    restore = stopping.handle(interrupt, signal.SIGTERM)
    try:
        yield
    except KeyboardInterrupt:
        if not received:
            raise
        if LAUNCHED not in os.environ:  # torchrun ends processes so, after an error of another one
            typer.echo(f"\nstopped by SIGTERM. {advice}", err=True)
        raise typer.Exit(stopping.status(received[0])) from None
    except typer.Exit:
        if not received:
            raise
        raise typer.Exit(stopping.status(received[0])) from None
    finally:
        restore()
