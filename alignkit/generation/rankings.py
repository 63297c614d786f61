"""InstructGPT's middle step as files: prompts, sampled answers, rankings. No torch here."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignkit import data
from alignkit.config import DataConfig
from alignkit.data.prompts import has_tools, prompt_of
from alignkit.errors import ConfigError, DataError, PluginError, did_you_mean, one_line
from alignkit.registry import Registry
from alignkit.rows import Conversation, Demonstration, Prompt, Ranking
from alignkit.runs import manifest

Scorer = Callable[[list[str], list[str]], Sequence[float]]  # prompts, answers -> scores, higher is better


def prompts_of(path: str) -> list[Conversation]:
    """The prompts of rows that have some, each once, in their order.

    Raises:
        DataError: from :mod:`alignkit.data`; a prompt has tools, without which an answer to it means nothing.
    """
    rows = data.load(Registry(), DataConfig(), path, (Prompt, Ranking, Demonstration)).rows
    if with_tools := next((at for at, row in rows if has_tools(row)), None):
        raise DataError(
            f"{with_tools}: a prompt with tools, and answers to those can be trained on but not sampled here"
        )
    prompts = [prompt_of(row) for _, row in rows]
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


def short(conversation: Conversation) -> str | Conversation:
    """A conversation of one user turn as its text."""
    alone = len(conversation) == 1 and conversation[0]["role"] == "user"
    return conversation[0]["content"] if alone else conversation


def continued(file: Path, prompts: list[Conversation], k: int, batch: int) -> int:
    """How many prompts a file of samples has done, in whole batches; what a kill left of another batch is cut off.

    Raises:
        ConfigError: the file is of other prompts, or of another K.
    """
    if not file.exists():
        return 0
    kept: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            break
        number = len(kept)
        fits = number < len(prompts) and isinstance(row, dict) and row.get("prompt") == short(prompts[number])
        if not fits or len(row.get("responses", [])) != k:
            raise ConfigError(
                f"{file} line {number + 1} is no {k} answers to prompt {number + 1}: choose another --output"
            )
        kept.append(line)
    whole = len(kept) if len(kept) == len(prompts) else len(kept) // batch * batch
    manifest.write_atomically(file, "".join(line + "\n" for line in kept[:whole]))
    return whole


def import_scorer(name: str) -> Scorer:
    """Import the function named ``module:function``, also from a module in the current folder.

    Raises:
        ConfigError: no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name:
        raise ConfigError(f"'{name}' is not module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(f"{module_name} could not be imported: {one_line(error)}") from error
    found = getattr(module, function_name, None)
    if not callable(found):
        hint = did_you_mean(function_name, [n for n in vars(module) if callable(getattr(module, n))])
        raise ConfigError(f"{module_name} has no function {function_name}.{hint}")

    def call(prompts: list[str], answers: list[str]) -> Sequence[float]:
        try:
            return found(prompts, answers)
        except Exception as failure:
            for prompt, answer in zip(prompts, answers, strict=True):
                try:
                    found([prompt], [answer])
                except Exception as error:
                    if one_line(error) == one_line(failure):
                        raise _FailedOnError(answer, error) from error
            raise

    return call


class _FailedOnError(Exception):
    def __init__(self, answer: str, why: Exception) -> None:
        super().__init__(answer)
        self.answer, self.why = answer, why


def checked(name: str, scores_of: Callable[[], Sequence[float]], answers: list[str]) -> list[float]:
    """The scores of answers by something named ``name``, checked: as many as there are answers, and all numbers.

    Raises:
        DataError: it raised, or gave something else; with its name and the answer that it was about.
    """
    try:
        scores = [float(value) for value in scores_of()]
    except (DataError, PluginError):
        raise
    except _FailedOnError as error:
        raise DataError(f"{name} failed on the answer {error.answer!r}: {one_line(error.why)}") from error
    except Exception as error:
        raise DataError(
            f"{name} failed on these answers, the first of which is {answers[0]!r}: {one_line(error)}"
        ) from error
    if len(scores) != len(answers):
        raise DataError(
            f"{name} gave {len(scores)} scores for {len(answers)} answers, the first of which is {answers[0]!r}"
        )
    for answer, value in zip(answers, scores, strict=True):
        if not math.isfinite(value):
            raise DataError(f"{name} gave {value} for the answer {answer!r}")
    return scores


def ranks(scores: Sequence[float]) -> list[int]:
    """Scores, of which higher is better, as ranks, of which lower is better; equal scores are ties."""
    order = sorted(set(scores), reverse=True)
    return [order.index(value) for value in scores]
