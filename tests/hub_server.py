"""A local stand-in for the hub's HTTP interface: models at revisions, private and gated ones."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_good"


class HubServer:
    """Serves folders as repositories: ``hub.repositories["acme/tiny"] = {"main": ("b" * 40, folder)}``."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, tuple[str, Path]]] = {}
        self.private: set[str] = set()  # without the token they are as if they did not exist
        self.gated: set[str] = set()
        self.actions: dict[str, Callable[[], None]] = {}  # path -> what a request of it does
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if path in self.actions:
            self.actions[path]()
            return self.send(request, 200, b"")
        words = [word for word in path.split("/") if word]
        if not words:
            return self.send(request, 200, b"")
        is_api = words[:2] == ["api", "models"]
        name, rest = "/".join(words[2:4] if is_api else words[:2]), words[4:] if is_api else words[2:]
        with_token = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name in self.gated:
            return self.send(request, 403 if request.headers.get("Authorization") else 401, b"", error="GatedRepo")
        if name not in self.repositories or (name in self.private and not with_token):
            return self.send(request, 404 if with_token else 401, b"", error="RepoNotFound")
        revisions = self.repositories[name]
        revision = rest[1] if len(rest) > 1 else "main"
        found = revisions.get(revision) or next((each for each in revisions.values() if each[0] == revision), None)
        if found is None:
            return self.send(request, 404, b"", error="RevisionNotFound")
        commit, folder = found
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if is_api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            return self.send(request, 200, json.dumps(tree).encode())
        if is_api:
            siblings = [{"rfilename": file.name} for file in files]
            about = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
            return self.send(request, 200, json.dumps(about).encode())
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.send(request, 404, b"", error="EntryNotFound", commit=commit)
        self.send(request, 200, file.read_bytes(), commit=commit)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, content: bytes, error: str = "", commit: str = ""
    ) -> None:
        request.send_response(status)
        headers = {"X-Error-Code": error, "X-Error-Message": error, "X-Repo-Commit": commit}
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"' if commit and status == 200 else ""
        for header, value in headers.items():
            if value:
                request.send_header(header, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


@pytest.fixture(scope="module")
def hub_server() -> Iterator[HubServer]:
    """A stand-in for the hub, without repositories."""
    server = HubServer()
    yield server
    server.stop()
