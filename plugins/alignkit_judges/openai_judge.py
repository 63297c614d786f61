"""The judge ``openai``: a model behind an endpoint that speaks ``/v1/chat/completions``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from alignkit import ConfigError, Question, Run
from alignkit_judges import prompts
from alignkit_judges.config import OPENAI

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

    from alignkit_judges.config import OpenAIConfig

BYTES_PER_TOKEN = 4  # of English text
MOST_REJECTED = 100  # requests in a row, before the first one that is answered


def check(config: OpenAIConfig) -> None:
    """Check the settings, the key and the files, without a request.

    Raises:
        ConfigError: the model, the address or the key is missing or malformed, or a file cannot be read.
    """
    if config.model is None:
        raise ConfigError("judge 'openai' needs judge.model: the name of a model on the server")
    if "@" in config.base_url:
        raise ConfigError("judge.base_url must not contain a user or a password: set judge.api_key_env for a key")
    if not _is_url(config.base_url):
        raise ConfigError(f"judge.base_url must be a URL such as http://localhost:8000/v1, not {config.base_url!r}")
    api_key(config)
    prompts.read_rubric(config.rubric)
    prompts.read_principles(config.principles)


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # from the port or the host
        return False


def api_key(config: OpenAIConfig) -> str | None:
    """The API key from the environment; None if the server gets none.

    No message quotes ``api_key_env``: it could be the key itself, by mistake.

    Raises:
        ConfigError: there is no such environment variable, or its value cannot be a key.
    """
    name = config.api_key_env
    if name is None and config.base_url.rstrip("/") != OPENAI:
        return None
    if name is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError("judge.api_key_env must be the name of an environment variable, not the key itself")
    key = os.environ.get(name or "OPENAI_API_KEY", "").strip()
    if not key:
        named = f"OPENAI_API_KEY to your key for {OPENAI}" if name is None else "that judge.api_key_env names"
        raise ConfigError(f"judge 'openai' needs an API key: set the environment variable {named}")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the environment variable with the API key contains characters that a key cannot have")
    return key


def identity(config: OpenAIConfig) -> str:
    """Everything that a verdict depends on beside the question.

    That includes the address, because many servers answer with the model that they have loaded, whatever the name in
    the request.
    """
    settings = {name: getattr(config, name) for name in ("model", "temperature", "max_tokens", "body")}
    return json.dumps(
        {
            "judge": "openai",
            "prompts": prompts.VERSION,
            "base_url": config.base_url.rstrip("/"),
            "rubric": prompts.read_rubric(config.rubric),
            "principles": prompts.read_principles(config.principles),
            **settings,
        },
        sort_keys=True,
        ensure_ascii=False,
    )


def tokens(config: OpenAIConfig, question: Question) -> int:
    """An estimate of the tokens that are sent to ask a question."""
    return -(-len(_asker(config)(question).encode()) // BYTES_PER_TOKEN)


def _asker(config: OpenAIConfig) -> Callable[[Question], str]:
    """A function that writes the message with a question."""
    rubric, principles = prompts.read_rubric(config.rubric), prompts.read_principles(config.principles)
    return lambda question: prompts.write(question, prompts.task_for(len(question.answers)), rubric, principles)


def build(config: OpenAIConfig, run: Run) -> Callable[[Sequence[Question]], Iterator[list[float] | None]]:
    """The judge: a function that asks several questions at a time, and yields their verdicts in order.

    A rejected request is no verdict if the server answers others, as when one question is too long for the model. If
    it answers none, the settings are wrong.
    """
    from alignkit_judges.chat_server import RejectedError, replies

    key, message = api_key(config), _asker(config)
    warned, answered = set[str](), False

    def warn(kind: str, line: str) -> None:
        if kind not in warned:
            run.say(f"warning: {line}")
        warned.add(kind)

    def judge(questions: Sequence[Question]) -> Iterator[list[float] | None]:
        nonlocal answered
        rejected: list[RejectedError] = []
        for question, reply in zip(questions, replies(config, key, map(message, questions)), strict=True):
            if isinstance(reply, RejectedError):
                rejected.append(reply)
            else:
                answered = True
            if answered:
                for error in rejected:
                    warn("rejected", f"no verdict on a question: {error}")
                    yield None
                rejected.clear()
            elif len(rejected) == MOST_REJECTED:
                break
            if not isinstance(reply, RejectedError):
                yield verdict(reply, len(question.answers), warn)
        if rejected:
            raise rejected[0]

    return judge


def verdict(reply: ChatCompletion, answers: int, warn: Callable[[str, str], None]) -> list[float] | None:
    """The ranks of this many answers; None for a refusal, a reply that was cut off, or one without a clear verdict."""
    choice = reply.choices[0]
    if choice.finish_reason == "length":
        warn("length", "no verdict in a reply that was cut off: increase judge.max_tokens")
        return None
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        warn("refusal", f"no verdict because the model refuses: {(choice.message.refusal or 'content filter')[:80]!r}")
        return None
    ranks = prompts.ranks(text := choice.message.content or "", answers)
    if ranks is None:
        warn("unreadable", f"no verdict in a reply such as {text[-80:]!r}")
    return ranks
