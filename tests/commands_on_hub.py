"""Runs commands one after another in one process, for tests that need a fresh environment. Reads and prints JSON.

Each command is ``[environment, arguments]``. Printed are, of each, its status and what it wrote, and then the addresses
to which the process connected.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import traceback
from typing import Any

ADDRESSES: list[Any] = []


def recorded(connect: Any) -> Any:
    def record(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX:
            ADDRESSES.append(f"{address[0]}:{address[1]}")
        return connect(self, address)

    return record


def main() -> None:
    socket.socket.connect = recorded(socket.socket.connect)  # type: ignore[method-assign]
    socket.getaddrinfo = names(socket.getaddrinfo)
    from alignkit import cli

    results = []
    for environment, arguments in json.load(sys.stdin):
        os.environ.update(environment)
        if environment.get("HF_HUB_OFFLINE"):  # otherwise read when the library is imported
            import huggingface_hub.constants

            huggingface_hub.constants.HF_HUB_OFFLINE = True
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = exec(arguments[1]) or 0 if arguments[0] == "python" else cli.main(arguments)  # type: ignore[func-returns-value]
            except BaseException:
                traceback.print_exc()
                status = -1
        results.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
    print(json.dumps({"results": results, "addresses": sorted(set(ADDRESSES))}))


def names(look_up: Any) -> Any:
    def record(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        ADDRESSES.append(f"{host}:{port}")
        return look_up(host, port, *args, **kwargs)

    return record


if __name__ == "__main__":
    main()
