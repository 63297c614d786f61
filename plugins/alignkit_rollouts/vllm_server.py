"""A vLLM server: its requests, repeated while it does not answer, and its errors as one line."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from alignkit import AlignkitError, UnavailableError, one_line
from alignkit.runs import fingerprint

if TYPE_CHECKING:
    from alignkit_rollouts.config import VllmConfig

TO_CONNECT = 10.0  # seconds
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds between attempts
BUSY = (429, 502, 503, 504)  # statuses of a server that may answer later
HOW = "`alignkit serve-rollouts` prints the command that starts it"


class Adapter(NamedTuple):
    """A version of the policy's adapter."""

    name: str  # on the server; another version has another name, since the server's prefix cache goes by names
    folder: Path


class Server:
    """A connection to a vLLM server. Several threads can use it."""

    def __init__(self, url: str, config: VllmConfig) -> None:
        self.url, self.config = url.rstrip("/"), config
        self.lock = threading.Lock()  # of loading
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        timeout = httpx.Timeout(config.timeout, connect=min(config.timeout, TO_CONNECT), pool=None)
        self.client = httpx.Client(timeout=timeout, limits=limits, trust_env=False)
        weakref.finalize(self, self.client.close)

    def check(self, base: str, weights: str | None, length: int) -> None:
        """Check that the server answers, with this base model, and for sequences of ``length`` tokens.

        ``weights`` is the fingerprint of the base. A base in a folder that is not on this machine is not compared:
        log-probabilities are, in each iteration.

        Raises:
            AlignkitError: it does not.
        """
        try:
            models = self.models(retry=False)
        except UnavailableError as error:
            raise AlignkitError(f"{error}. {HOW}") from None
        card = next((model for model in models if not model.get("parent")), {})
        root, maximum = str(card.get("root")), card.get("max_model_len")
        other = root != base and not Path(root).exists() and not Path(base).exists()
        if weights is not None and Path(root).is_dir():
            other = fingerprint(Path(root))["weights"] != weights
        if other:
            raise AlignkitError(f"the vLLM server at {self.url} has another base model: {root}, not {base}. {HOW}")
        if isinstance(maximum, int) and maximum < length:
            raise AlignkitError(
                f"the vLLM server at {self.url} supports {maximum} tokens, and prompts and answers can have {length}: "
                f"start it with --max-model-len {length}"
            )

    def models(self, retry: bool = True) -> list[dict[str, Any]]:
        """The base model and the adapters that the server has."""
        reply = self._request("GET", "/v1/models", retry_for=self.config.retry_for if retry else 0)
        models = _json(reply).get("data")
        if reply.status_code != 200 or not isinstance(models, list) or not models:
            raise AlignkitError(f"{self.url} is not a vLLM server: it has no /v1/models ({reply.status_code}). {HOW}")
        return models

    def load(self, adapter: Adapter) -> None:
        """Load an adapter, if the server does not have it.

        Raises:
            UnavailableError: the server cannot load it.
        """
        with self.lock:
            if self._has(adapter):
                return
            body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
            reply = self._request("POST", "/v1/load_lora_adapter", body, again=BUSY)
            if reply.status_code == 200 or self._has(adapter):  # from an attempt whose reply was lost
                return
        if reply.status_code == 404 and "error" not in _json(reply):
            reason = "it was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        elif reply.status_code == 404:
            reason = f"{_text(reply)}. The server must see the run folder, on this machine or on a shared disk"
        else:
            reason = _text(reply)
        raise UnavailableError(f"the vLLM server at {self.url} cannot load the policy's adapter: {reason}. {HOW}")

    def _has(self, adapter: Adapter) -> bool:
        return any(model.get("id") == adapter.name for model in self.models())

    def unload(self, name: str) -> None:
        """Remove an adapter. A server that was restarted does not have it."""
        self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, again=BUSY)

    def complete(self, adapter: Adapter, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of a completion by an adapter, in order. A server that was restarted loads the adapter again.

        Raises:
            UnavailableError: the server does not answer, rejects the request, or has no such number of answers.
        """
        body = {"model": adapter.name, **body}
        reply = self._request("POST", "/v1/completions", body)
        if reply.status_code == 404:
            self.load(adapter)
            reply = self._request("POST", "/v1/completions", body)
        if reply.status_code != 200:
            raise UnavailableError(f"the vLLM server at {self.url} rejects a request: {_text(reply)}")
        choices = _json(reply).get("choices")
        if not isinstance(choices, list) or len(choices) != body["n"]:
            raise UnavailableError(f"the vLLM server at {self.url} did not return {body['n']} answers")
        return sorted(choices, key=lambda choice: choice["index"])

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        again: tuple[int, ...] = (500, *BUSY),
        retry_for: float | None = None,
    ) -> httpx.Response:
        """The reply to a request, which is repeated after a failure that may pass.

        Raises:
            UnavailableError: the server still fails, or does not answer, ``retry_for`` seconds after it first did.
        """
        retry_for = self.config.retry_for if retry_for is None else retry_for
        until, delay = None, FIRST_DELAY
        while True:
            try:
                reply = self.client.request(method, self.url + path, json=body)
                if reply.status_code not in again:
                    return reply
                failure = f"fails ({reply.status_code}): {_text(reply)}"
            except httpx.ConnectError as error:
                failure = f"cannot be reached: {error}"
            except httpx.TimeoutException:
                failure = f"did not answer within rollout.timeout={self.config.timeout:g} seconds"
            except httpx.TransportError as error:
                failure = f"closed the connection: {one_line(error)}"
            until = until or time.monotonic() + retry_for
            if time.monotonic() >= until:
                repeated = f" (repeated for rollout.retry_for={retry_for:g} seconds)" if retry_for else ""
                raise UnavailableError(f"the vLLM server at {self.url} {failure}{repeated}")
            time.sleep(min(delay, max(0.0, until - time.monotonic())))
            delay = min(2 * delay, LONGEST_DELAY)


def _json(reply: httpx.Response) -> dict[str, Any]:
    """The body of a reply; empty if it is not a JSON object."""
    try:
        body = reply.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _text(reply: httpx.Response) -> str:
    """The message of an error on one line."""
    error = _json(reply).get("error")
    message = error.get("message") if isinstance(error, dict) else reply.text
    return " ".join(str(message).split())[:300].rstrip(". ")
