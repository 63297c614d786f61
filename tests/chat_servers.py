"""Servers that speak ``/v1/chat/completions``, for the tests of judges: one that follows a script, and a real one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[dict[str, Any]], Any]  # the body of a request -> the reply's text, or a Starlette response


class Served:
    """An application on the loopback interface, in a thread."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class ScriptedServer(Served):
    """An HTTP server whose replies come from ``script``. It records the requests."""

    def __init__(self) -> None:
        from starlette.applications import Starlette
        from starlette.routing import Route

        self.script: Script = lambda body: "tie"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        super().__init__(Starlette(routes=[Route("/v1/chat/completions", self._reply, methods=["POST"])]))
        self.url += "/v1"

    async def _reply(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse, Response

        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        reply = await run_in_threadpool(self.script, body)
        return reply if isinstance(reply, Response) else JSONResponse(completion(reply))


def completion(content: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A reply as JSON, with further fields of its message."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def error(status: int, message: str = "no", **headers: str) -> Any:
    """An error in the form of OpenAI's API."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": "t", "code": None}}, status, headers)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
def chat_server(scripted_server: ScriptedServer) -> ScriptedServer:
    """A scripted server without a script and without requests."""
    scripted_server.script = lambda body: "tie"
    scripted_server.requests.clear()
    scripted_server.headers.clear()
    return scripted_server


@pytest.fixture(scope="module")
def transformers_serve() -> Iterator[tuple[str, str]]:
    """``transformers serve`` with the bundled model in a process of its own: its address, and the model's name."""
    from alignkit import bundled

    folder, port = bundled.convert("bundled:smollm2-135m", print), free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "transformers serve ended"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait()
