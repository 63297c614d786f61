"""Runs the server until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.labeling.store import Store


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

    Raises:
        ConfigError: the port is in use, or the host is not an address of this machine.
    """
    import uvicorn

    from alignkit.labeling.app import build

    token = secrets.token_urlsafe(24)
    listening = _listen(host, store.port() if port is None else port, port is None)
    store.set_port(listening.getsockname()[1])
    app = build(samples, store, token, host, labeler, as_markdown)
    address = f"http://{_named(host)}:{listening.getsockname()[1]}/?token={token}"
    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=1
    )
    say(f"open {address}")
    if open_browser:
        webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int, any_port: bool) -> socket.socket:
    """A socket that listens. With ``any_port``, ``port`` is only a preference."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        if any_port and port:
            return _listen(host, 0, any_port)
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is in use. Choose another one, or leave the option out") from None
        raise ConfigError(f"--host {host}, port {port}: {error.strerror}") from None
    return listening


def _named(host: str) -> str:
    """The host as it is written in an address."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
