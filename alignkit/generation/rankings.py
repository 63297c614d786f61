"""InstructGPT's second step as files: prompts, sampled answers, rankings. Importing this module imports no torch."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit import data
from alignkit.batches import Answers
from alignkit.config import DataConfig
from alignkit.data.prompts import has_tools, prompt_of, prompt_text
from alignkit.data.reading import SAMPLED_FROM
from alignkit.errors import ConfigError, DataError, PluginError, one_line, suggestion
from alignkit.registry import Registry, checks
from alignkit.rows import Conversation, Demonstration, Located, Prompt, Ranking
from alignkit.runs import manifest

ScoreFunction = Callable[[Answers], Sequence[float]]  # higher is better
OPTIONAL = ("conversations", "fields")  # parameters that a Python function may have beside prompts and answers


def prompts_of(path: str) -> list[Conversation]:
    """The distinct prompts of a file of prompts, rankings or demonstrations, in their order. Raises as the next one."""
    return [prompt for prompt, _ in prompts_and_fields(path)]


def prompts_and_fields(path: str) -> list[tuple[Conversation, Mapping[str, Any]]]:
    """The distinct prompts of a file as :func:`prompts_of`, each with the other fields of its row, for rewards.

    Raises:
        DataError: from :mod:`alignkit.data`; or a prompt has tools.
    """
    rows = data.load(Registry(), DataConfig(), path, (Prompt, Ranking, Demonstration)).rows
    if with_tools := next((at for at, row in rows if has_tools(row)), None):
        raise DataError(f"{with_tools}: the prompt has tools. Answers to such prompts can be trained on, not sampled")
    distinct: dict[str, tuple[Conversation, Mapping[str, Any]]] = {}
    for located in rows:
        prompt = prompt_of(located.row)
        distinct.setdefault(json.dumps(prompt), (prompt, fields_of(located)))
    return list(distinct.values())


def fields_of(located: Located) -> Mapping[str, Any]:
    """The fields that a row keeps for rewards."""
    return located.row.fields if isinstance(located.row, Prompt) else {}


def short(conversation: Conversation) -> str | Conversation:
    """A conversation as it is written to a file: as its text if it is one user turn."""
    is_text = len(conversation) == 1 and conversation[0]["role"] == "user"
    return conversation[0]["content"] if is_text else conversation


def continued(file: Path, prompts: list[Conversation], k: int, batch: int, sampled_from: dict[str, Any]) -> int:
    """The number of answered prompts in a file of samples, in whole batches. A partial batch is removed from the file.

    Raises:
        ConfigError: the file has other prompts, another K, or answers that were not ``sampled_from`` the same model
            with the same settings.
    """
    if not file.exists():
        return 0
    kept: list[str] = []
    for line in file.read_text(encoding="utf-8").split("\n"):  # `splitlines` splits at U+2028 too
        try:
            row = json.loads(line)
        except ValueError:  # a partial line
            break
        number = len(kept)
        matches = number < len(prompts) and isinstance(row, dict) and row.get("prompt") == short(prompts[number])
        if not matches or len(row.get("responses", [])) != k:
            raise ConfigError(
                f"{file} line {number + 1} does not hold {k} answers to prompt {number + 1}: choose another --output"
            )
        before = row.get(SAMPLED_FROM, sampled_from)  # rows of earlier versions have no such field
        if changed := [key for key, value in sampled_from.items() if before.get(key) != value]:
            was, now = before.get(changed[0]), sampled_from[changed[0]]
            raise ConfigError(
                f"{file} line {number + 1} was sampled with {changed[0]}={was}, not {now}: choose another --output"
            )
        kept.append(line)
    complete = len(kept) if len(kept) == len(prompts) else len(kept) // batch * batch
    manifest.write_atomically(file, "".join(line + "\n" for line in kept[:complete]))
    return complete


def import_scorer(name: str) -> ScoreFunction:
    """Import the function named ``module:function``, also from a module in the current folder, as a :func:`scorer`.

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
    except Exception as error:  # whatever the module raises
        raise ConfigError(f"{module_name} could not be imported: {one_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(suggestion(f"{module_name} has no function {function_name}", function_name, functions))
    return scorer(function)


def scorer(function: Callable[..., Sequence[float]]) -> ScoreFunction:
    """A Python function of two lists of strings, prompts and answers, as a function of :class:`alignkit.Answers`.

    A prompt is the last user turn of its conversation. If the function has a parameter ``conversations``, it also gets
    the whole conversations, as lists of messages; if it has a parameter ``fields``, the other fields of the prompts'
    rows. If it fails, the error names the answer on which it does.
    """
    takes = [name for name in OPTIONAL if checks.accepts(function, name)]

    def scores(answers: Answers) -> Sequence[float]:
        optional = {"conversations": answers.prompts, "fields": answers.fields}
        prompts = [prompt_text(prompt) for prompt in answers.prompts]
        given = {name: copy.deepcopy(optional[name]) for name in takes}  # the function may change what it gets
        return function(prompts, list(answers.texts), **given)

    def call(answers: Answers) -> Sequence[float]:
        try:
            return scores(answers)
        except Exception as failure:
            for index, text in enumerate(answers.texts):
                try:
                    scores(answers.take([index]))
                except Exception as error:
                    if one_line(error) == one_line(failure):
                        raise _FailedOnError(text, error) from error
            raise

    return call


class NotFiniteError(DataError):
    """A scorer returned a score that is not a finite number."""

    def __init__(self, message: str, scores: list[float]) -> None:
        super().__init__(message)
        self.scores = scores  # all of them


class _FailedOnError(Exception):
    def __init__(self, answer: str, error: Exception) -> None:
        super().__init__(answer)
        self.answer, self.error = answer, error


def checked(name: str, scores_of: Callable[[], Sequence[float]], answers: list[str]) -> list[float]:
    """Check that ``scores_of`` returns one finite number for each answer, and return them.

    Raises:
        DataError: it raises an exception or returns something else. The message has ``name`` and the answer.
    """
    try:
        scores = [float(value) for value in scores_of()]
    except (DataError, PluginError):
        raise
    except _FailedOnError as error:
        raise DataError(f"{name} failed on the answer {error.answer!r}: {one_line(error.error)}") from error
    except Exception as error:
        raise DataError(f"{name} failed on these answers, the first is {answers[0]!r}: {one_line(error)}") from error
    if len(scores) != len(answers):
        raise DataError(f"{name} returned {len(scores)} scores for {len(answers)} answers, the first is {answers[0]!r}")
    for answer, value in zip(answers, scores, strict=True):
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} returned {value} for the answer {answer!r}", scores)
    return scores


def ranks(scores: Sequence[float]) -> list[int]:
    """Convert scores to ranks: the highest score has rank 0, equal scores have equal ranks."""
    order = sorted(set(scores), reverse=True)
    return [order.index(value) for value in scores]
