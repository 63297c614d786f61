"""Runs commands of alignkit in one process and records what they do: ``audited.py FILE COMMANDS``, both as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
recorded: dict[str, list[Any]] = {
    "sockets": [],
    "processes": [],
    "unpickled": [],
    "imported": [],
    "written": [],
    "statuses": [],
}


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in SOCKETS:
        recorded["sockets"].append(f"{event} {arguments[1:]!r}")
    elif event in PROCESSES:
        recorded["processes"].append(f"{event} {arguments!r}")
    elif event == "pickle.find_class":
        recorded["unpickled"].append(".".join(map(str, arguments)))
    elif event == "import":
        recorded["imported"].append(arguments[0])
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        recorded["written"].append(os.path.abspath(arguments[0]))


def main() -> None:
    from alignkit.cli import main

    sys.addaudithook(audit)
    for command in json.loads(sys.argv[2]):
        recorded["statuses"].append([command, main(command)])
    Path(sys.argv[1]).write_text(json.dumps(recorded))


if __name__ == "__main__":
    main()
