"""Runs the server until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.labeling.store import Store

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine reaches


def serve(
    samples: Path,
    store: Store,
    host: str,
    port: int | None,
    labeler: str | None,
    as_markdown: bool,
    say: Callable[[str], None],
    open_browser: bool,
) -> None:
    """Serve the page until Ctrl-C. ``say`` prints its address.

    Without ``port``, the server has the port of the last time if it is free: an open page then continues by itself.

    Raises:
        ConfigError: the port is in use, or the host is not an address of this machine.
    """
    import uvicorn

    from alignkit.labeling.app import build
    from alignkit.labeling.security import Tokens

    with _listen_again(host, store.port()) if port is None else listen(host, port) as listening:
        number = listening.getsockname()[1]
        store.set_port(number)
        tokens = Tokens()
        app = build(samples, store, tokens, host, labeler, as_markdown)
        address = f"http://{_named(host)}:{number}/?token="
        say(f"open {address}{tokens.printed} (press Ctrl-C to stop)")
        if open_browser:
            webbrowser.open(f"{address}{tokens.once}")
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        ConfigError: the port is in use, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)  # without the protocol, asyncio does not set TCP_NODELAY
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    try:
        if os.name == "posix":  # elsewhere, it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is in use: choose another one") from None
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from None
    return listening


def _listen_again(host: str, port: int) -> socket.socket:
    """A socket on this port, or on any other if it is in use."""
    try:
        return listen(host, port)
    except ConfigError:
        return listen(host, 0)


def _named(host: str) -> str:
    """The host as it is written in an address."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
