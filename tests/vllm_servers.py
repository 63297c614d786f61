"""A server with the routes of vLLM that ``rollout.name=vllm`` uses, on a tiny model with PEFT adapters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

Reply = tuple[int, Any]  # a status, and a body


def error(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "type": "t", "code": status}}


class VllmServer:
    """The routes, and what a test can make of them: ``faults``, a server that does not load, death, another base."""

    def __init__(self, base: Path) -> None:
        self.base, self.root, self.max_model_len = base, str(base), 512
        self.loads_adapters = self.reloads = True
        self.faults: list[int | str] = []  # of the next completions: a status, "hang" for three seconds, or "close"
        self.dies_at: int | None = None  # the completion at which it is killed, the first is 1
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.lock, self.port = threading.Lock(), 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[dict[str, Any]]:
        return [body for path, body in self.requests if path == "/v1/completions"]

    def start(self) -> None:
        """Start on the port that it had, without adapters."""
        self.adapters: dict[str, str] = {}
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                server.requests.append((self.path, body))
                try:
                    status, reply = server.reply(self.path, body)
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client has given up
                    self.close_connection = True

        class Listener(ThreadingHTTPServer):
            daemon_threads, allow_reuse_address = True, True

        self.dead = False
        self.http = Listener(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def die(self) -> None:
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        if self.dead:
            raise ConnectionAbortedError
        routes: dict[str, Callable[[dict[str, Any]], Reply]] = {"/v1/models": self.models}
        if self.loads_adapters:
            routes |= {"/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
        routes["/v1/completions"] = self.complete
        return routes[path](body) if path in routes else (404, {"detail": "Not Found"})

    def models(self, body: dict[str, Any]) -> Reply:
        base = {"id": self.root, "root": self.root, "parent": None, "max_model_len": self.max_model_len}
        loaded = [{"id": name, "root": path, "parent": self.root} for name, path in self.adapters.items()]
        return 200, {"object": "list", "data": [base, *loaded]}

    def load(self, body: dict[str, Any]) -> Reply:
        name, path = body["lora_name"], body["lora_path"]
        with self.lock, torch.random.fork_rng():  # the trainer is in this process, and waits
            if name in self.adapters:
                return error(400, f"The lora adapter '{name}' has already been loaded.")
            if not (Path(path) / "adapter_config.json").is_file():
                return error(404, f"Loading lora {name} failed: No adapter found for {path}")
            if rank := json.loads((Path(path) / "adapter_config.json").read_text())["r"] > 16:
                return error(500, f"LoRA rank {rank} is greater than max_lora_rank 16.")
            if self.reloads or not self.adapters:
                if isinstance(self.model, peft.PeftModel):
                    self.model.load_adapter(path, name.replace(".", "-"))
                else:
                    self.model = peft.PeftModel.from_pretrained(self.model, path, name.replace(".", "-")).eval()
            self.adapters[name] = path
        return 200, "Success"

    def unload(self, body: dict[str, Any]) -> Reply:
        if self.adapters.pop(body["lora_name"], None) is None:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"

    def complete(self, body: dict[str, Any]) -> Reply:
        if body["model"] not in self.adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        if len(self.completions) == self.dies_at:
            threading.Thread(target=self.die).start()
            time.sleep(0.05)
            raise ConnectionAbortedError
        if fault := self.faults.pop(0) if self.faults else None:
            if fault == "close":
                raise ConnectionAbortedError
            if fault == "hang":
                time.sleep(3)
            else:
                return error(int(fault), "EngineCore encountered an issue")
        if body["n"] > 1 and not body["temperature"]:
            return error(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        with self.lock, torch.no_grad():
            if self.reloads:
                self.model.set_adapter(body["model"].replace(".", "-"))
            return 200, {"choices": [{"index": i, **self.answer(body, i)} for i in reversed(range(body["n"]))]}

    def answer(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """Token by token, without a cache."""
        generator = torch.Generator().manual_seed(body["seed"] + number)
        ids, logps = list(body["prompt"]), []
        room = min(body["max_tokens"], self.max_model_len - len(ids))  # vLLM cuts the answer, and does not complain
        for _ in range(room):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            logprobs = (logits / (body["temperature"] or 1)).log_softmax(-1)
            sampled = (
                torch.multinomial(logprobs.exp(), 1, generator=generator) if body["temperature"] else logprobs.argmax()
            )
            ids.append(int(sampled))
            logps.append(float(logprobs[ids[-1]]))
            if ids[-1] in body["stop_token_ids"]:
                break
        answer = ids[len(body["prompt"]) :]
        return {"token_ids": answer, "logprobs": {"token_logprobs": logps}}


@pytest.fixture
def vllm_server(tiny_model: Callable[..., Path]) -> Iterator[Callable[[], VllmServer]]:
    """``vllm_server()``: a server with the tiny model."""
    servers: list[VllmServer] = []

    def make() -> VllmServer:
        servers.append(VllmServer(tiny_model()))
        return servers[-1]

    yield make
    for server in servers:
        if not server.dead:
            server.die()
