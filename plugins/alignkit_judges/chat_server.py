"""Requests to an endpoint that speaks ``/v1/chat/completions``, and its errors as one line.

Retries with backoff on 408, 409, 429, 5xx, time-outs and lost connections are those of the ``openai`` client library.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import openai
from anyio.from_thread import start_blocking_portal
from openai.types.chat import ChatCompletion

from alignkit import AlignkitError, one_line
from alignkit_judges.config import OPENAI

if TYPE_CHECKING:
    from alignkit_judges.config import OpenAIConfig


class RejectedError(AlignkitError):
    """The server rejects this request: the question is too long for the model, or the settings are wrong."""


REJECTED = (400, 413, 422)  # the statuses of such replies
TO_CONNECT = 10.0  # seconds


class ChatServer:
    """A connection to a server, with the model and the options of a config. The key appears in no message."""

    def __init__(self, config: OpenAIConfig, key: str | None) -> None:
        self.config, self.key = config, key
        self.client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            timeout=openai.Timeout(config.timeout, connect=min(config.timeout, TO_CONNECT)),
            max_retries=config.retries,
        )
        limit = "max_completion_tokens" if config.base_url.rstrip("/") == OPENAI else "max_tokens"  # OpenAI renamed it
        options = {"temperature": config.temperature, limit: config.max_tokens}
        self.options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}

    async def reply(self, message: str) -> ChatCompletion:
        """The reply to a message, with at least one choice.

        Raises:
            RejectedError: the server rejects this request.
            AlignkitError: the server cannot be reached or used.
        """
        try:
            reply = await self.client.chat.completions.create(
                model=str(self.config.model),
                messages=[{"role": "user", "content": message}],
                extra_body=self.config.body,
                **self.options,
            )
        except openai.APIStatusError as error:
            if error.status_code in REJECTED:
                raise RejectedError(f"{self.config.base_url} rejects a request: {self._text(error)}") from None
            raise AlignkitError(self._failure(error)) from None
        except openai.APIError as error:
            raise AlignkitError(self._failure(error)) from None
        except ValueError:  # JSON that cannot be parsed
            reply = None
        if not isinstance(reply, ChatCompletion) or not reply.choices:
            raise AlignkitError(
                f"{self.config.base_url} did not reply as /v1/chat/completions does: check judge.base_url, which "
                "usually ends in /v1"
            )
        return reply

    def _failure(self, error: openai.APIError) -> str:
        url, model, retries = self.config.base_url, self.config.model, self.config.retries
        if isinstance(error, openai.APITimeoutError):
            return f"{url} did not reply within judge.timeout={self.config.timeout:g} seconds, after {retries} retries"
        if isinstance(error, openai.APIConnectionError):
            return f"{url} cannot be reached: {one_line(_root(error))}"
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        if status in (401, 403):
            remedy = "check the key" if self.key else "name the environment variable of its key with judge.api_key_env"
            return f"{url} refuses the API key ({status}): {remedy}. {self._text(error)}"
        if status == 404:
            return f"{url} has no model '{model}', or no /chat/completions (404). {self._text(error)}"
        if status == 429:
            return f"{url} limits the rate of requests (429), after {retries} retries. {self._text(error)}"
        return f"{url} failed ({status}), after {retries} retries. {self._text(error)}"

    def _text(self, error: BaseException) -> str:
        """The message of an error on one line, without the key."""
        body = getattr(error, "body", None)
        text = body.get("message") or body.get("detail") if isinstance(body, dict) else None
        text = " ".join(str(text).split()) if text else one_line(error)
        return (text.replace(self.key, "***") if self.key else text)[:300].rstrip(". ")


def _root(error: BaseException) -> BaseException:
    """The first of the errors that led to this one, such as ``ConnectionRefusedError``."""
    if isinstance(error, BaseExceptionGroup):  # of attempts at several addresses
        return _root(error.exceptions[0])
    cause = error.__cause__ or error.__context__
    return error if cause is None else _root(cause)


def replies(config: OpenAIConfig, key: str | None, messages: Iterable[str]) -> Iterator[ChatCompletion | RejectedError]:
    """The reply to each message in order, with up to ``config.concurrency`` requests under way.

    An error is raised after the replies to all messages before it. It ends the requests that are still under way, as
    does Ctrl-C.
    """
    server, waiting = ChatServer(config, key), iter(messages)

    async def ask(message: str) -> ChatCompletion | RejectedError:
        try:
            return await server.reply(message)
        except RejectedError as error:
            return error

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server.client):
        first = itertools.islice(waiting, config.concurrency)
        under_way = deque(portal.start_task_soon(ask, message) for message in first)
        while under_way:
            reply = under_way.popleft().result()
            under_way.extend(portal.start_task_soon(ask, message) for message in itertools.islice(waiting, 1))
            yield reply
