"""The settings of the judges and of the reward ``judge``, and their checks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from alignkit import ConfigError, option
from alignkit.generation import import_scorer, locate_policy
from alignkit.runs import fingerprint, locate_model, model_folder
from alignkit_judges import prompts

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class FunctionConfig:
    """The ``judge`` table of ``function``."""

    call: str | None = option(
        None,
        "module:function; takes lists of prompts (last user turns) and answers; returns scores",
        needs_trust="runs this code",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The ``judge`` table of ``reward-model``."""

    path: str | None = option(None, "a run folder of stage rm")


@dataclass(frozen=True)
class RewardConfig:
    """The ``reward`` table of ``judge``."""

    judge: dict[str, Any] = option({}, "the judge: a table with its name and its settings")
    baseline: str | None = option(
        None, "a file of answers, as `alignkit sample` writes it: what a single answer to a prompt is compared with"
    )


@dataclass(frozen=True)
class OpenAIConfig:
    """The ``judge`` table of ``openai``."""

    model: str | None = option(None, "the name of a model on the server")
    base_url: str = option(
        OPENAI, "the address of the server, usually up to /v1", needs_trust="sends prompts and answers to this server"
    )
    api_key_env: str | None = option(
        None,
        "the name of the environment variable with the API key; null: OPENAI_API_KEY for OpenAI, none elsewhere",
        resume="may_change",
        needs_trust="sends the content of this environment variable to the server",
    )
    rubric: str | None = option(None, "a text file: how to tell which answer is better; null: a short default")
    principles: list[str] | str = option(
        [], "a list, or a text file with one per line: each comparison also gets one of them, drawn by a hash"
    )
    largest: Annotated[int, Ge(2), Le(26)] = option(
        2, "rank up to so many answers in one request, for prompts with more than four; 2: only pairs"
    )
    temperature: Annotated[float, Ge(0)] | None = option(0.0, "the sampling temperature; null: the server's default")
    max_tokens: Annotated[int, Gt(0)] | None = option(
        2048, "the longest reply in tokens, thoughts included; null: the server's default"
    )
    body: dict[str, Any] = option({}, "other fields of the request, such as reasoning_effort: low")
    concurrency: Annotated[int, Gt(0)] = option(8, "requests at a time", resume="may_change")
    timeout: Annotated[float, Gt(0)] = option(120.0, "seconds to wait for a reply", resume="may_change")
    retries: Annotated[int, Ge(0)] = option(
        4,
        "how often a request is repeated after a time-out, a lost connection, or status 429 or 5xx",
        resume="may_change",
    )


@dataclass(frozen=True)
class LocalConfig:
    """The ``judge`` table of ``local``."""

    model: str | None = option(None, "a run folder of a policy, a model folder or a hub id")
    rubric: str | None = option(None, "a text file: how to tell which answer is better; null: a short default")
    principles: list[str] | str = option(
        [], "a list, or a text file with one per line: each comparison also gets one of them, drawn by a hash"
    )
    batch: Annotated[int, Gt(0)] = option(8, "questions per forward pass", resume="may_change")


def check_local(config: LocalConfig) -> None:
    """Check that the model exists, and the files, without loading anything.

    Raises:
        AlignkitError: there is no such model, or a file cannot be read.
    """
    if config.model is None:
        raise ConfigError("judge 'local' needs judge.model: a run folder, a model folder or a hub id")
    locate_policy(config.model)
    prompts.read_rubric(config.rubric)
    prompts.read_principles(config.principles)


def identity_of_local(config: LocalConfig) -> str | None:
    """Everything that a verdict depends on beside the question; None if the model is not on this machine yet."""
    name, record = locate_policy(str(config.model))
    folder = Path(name) if record else model_folder(locate_model(name, print))
    if folder is None:
        return None
    depends = {
        "judge": "local",
        "prompts": prompts.VERSION,
        "model": fingerprint(folder),
        "base": record["base"]["weights"] if record and record["weights"] == "adapter" else None,
        "rubric": prompts.read_rubric(config.rubric),
        "principles": prompts.read_principles(config.principles),
    }
    return json.dumps(depends, sort_keys=True, ensure_ascii=False)


def check_function(config: FunctionConfig) -> None:
    if config.call is None:
        raise ConfigError("judge 'function' needs judge.call=module:function")
    import_scorer(config.call)
