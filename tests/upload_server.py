"""A stand-in for the Hugging Face Hub: the part of its HTTP interface that uploads use."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from chat_servers import Served


class UploadServer(Served):
    """Keeps repositories in memory. ``fails`` is a part of a path whose requests fail with status 500."""

    def __init__(self) -> None:
        from starlette.applications import Starlette
        from starlette.routing import Route

        self.repositories: dict[str, dict[str, Any]] = {}  # name -> private, files
        self.stored: dict[str, bytes] = {}  # large files, by their SHA-256
        self.role, self.fails = "write", ""
        self.requests: list[str] = []
        super().__init__(
            Starlette(routes=[Route("/{path:path}", self._reply, methods=["GET", "POST", "PUT", "DELETE"])])
        )

    async def _reply(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        path, body = request.url.path, await request.body()
        self.requests.append(f"{request.method} {path}")
        if self.fails and self.fails in path:
            return JSONResponse({"error": "Internal Server Error"}, 500)
        if path.startswith("/stored/"):
            self.stored[path.removeprefix("/stored/")] = body
            return JSONResponse({})
        if request.headers.get("authorization") != "Bearer hf_right":
            return JSONResponse({"error": "Invalid credentials in Authorization header"}, 401)
        status, reply = self._answer(f"{request.method} {path}", body)
        return JSONResponse(reply, status, {"X-Error-Code": "RepoNotFound"} if status == 404 else {})

    def _answer(self, request: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON of a request's reply."""
        method, path = request.split(" ", 1)
        content = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            return 200, {}
        if path.startswith("/api/repos/"):
            name = f"{content['organization']}/{content['name']}"
            if method == "DELETE":
                del self.repositories[name]
                return 200, {}
            if name in self.repositories:
                return 409, {"error": "You already created this model repo"}
            self.repositories[name] = {"private": content.get("visibility") == "private", "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        name = "/".join(path.removeprefix("/api/models").split(".git/")[0].split("/")[1:3])
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            modes = {
                file["path"]: "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"
                for file in content["files"]
            }
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/stored/{each['oid']}"}}}
                for each in content["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/settings"):
            repository["private"] = content.get("visibility", "private") == "private"
            return 200, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    stored = self.stored[value["oid"]]
                    assert hashlib.sha256(stored).hexdigest() == value["oid"]
                    repository["files"][value["path"]] = stored
            return 200, {"commitUrl": f"{self.url}/{name}/commit/0", "commitOid": "0" * 40}
        return 200, {"id": name, "modelId": name, "siblings": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadServer]:
    """The stand-in, to which this process and its children talk with a token that may write."""
    from huggingface_hub import constants

    server = UploadServer()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    for name, text in {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.stop()
