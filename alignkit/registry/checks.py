"""Checks the values that plugins return. An error names the plugin, the value, and what was expected.

Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from alignkit.batches import LossOutput, Question, SampledAnswers, Sampling
from alignkit.components import Component
from alignkit.errors import AlignkitError, PluginError, one_line
from alignkit.protocols import Engine
from alignkit.registry.plugin import Plugin
from alignkit.rows import Demonstration, Prompt, Ranking, Rated, Row, Text

_ROWS = (Demonstration, Ranking, Rated, Prompt, Text, Row)  # the protocol last: to check it takes longer


def expect(source: str, value: Any, valid: bool, expected: str) -> None:
    """Check a value that ``source``, a description of a function, returned.

    Raises:
        PluginError: ``valid`` is false.
    """
    if not valid:
        hint = ". Is a `return` missing?" if value is None else ""
        raise PluginError(f"{source} returned {shown(value)}, expected {expected}{hint}")


def shown(value: Any) -> str:
    """A value for an error message: its repr if that is short, else its type."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict | type):
        short = " ".join(repr(value).split())
        if len(short) <= 60:
            return short
    return f"a {type(value).__name__}"


def function(source: str, value: Any) -> Any:
    """Check the result of a ``build`` that must be a function."""
    expect(source, value, callable(value), "a function")
    return value


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter called ``name``."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # some functions written in C have no signature
        return False


def wants_plan(component: Component) -> bool:
    """Whether the ``check`` of a component takes the plan of the run beside its config."""
    return component.check is not None and accepts(component.check, "plan")


def settings(component: Component, config: Any) -> None:
    """Call the ``check`` of a component outside training."""
    if component.check is not None:
        component.check(config, plan=None) if wants_plan(component) else component.check(config)


def with_roles(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward or an engine that can be called with ``roles=``, which is passed on if its signature has ``roles``."""
    if accepts(function, "roles"):
        return function
    return lambda *arguments, roles=None: function(*arguments)


def tables(source: str, value: Any) -> list[dict[str, Any]]:
    """Check the result of a ``less_memory``: tables of settings."""
    valid = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    found = list(value) if valid else []
    named = all(isinstance(each, Mapping) and each and all(isinstance(key, str) for key in each) for each in found)
    expect(source, value, valid and named, "a list of tables of settings")
    return [dict(each) for each in found]


def text(source: str, value: Any) -> str:
    """Check the result of a stage's ``extent``, ``in_memory`` or ``note``: a string."""
    expect(source, value, isinstance(value, str), "a string")
    return str(value)


def needs(source: str, value: Any) -> Mapping[str, str]:
    """Check the result of a reward's ``needs``: role -> stage."""
    valid = isinstance(value, Mapping) and all(isinstance(each, str) for each in (*value, *value.values()))
    expect(source, value, valid, "a dict of roles and stages, such as {'reward': 'rm'}, or {}")
    return dict(value)


def scores(source: str, value: Any) -> Any:
    """Check the result of a reward. :func:`alignkit.generation.rankings.checked` checks the number of scores."""
    valid = hasattr(value, "__iter__") and not isinstance(value, str | Mapping)
    expect(source, value, valid, "a list with one score per answer")
    return value


def verdicts(source: str, value: Any, questions: Sequence[Question]) -> Iterator[Sequence[float] | None]:
    """Check the result of a judge: for each question the ranks of its answers, or None. Yields each when it arrives."""
    each_is = "for each question a list with one rank per answer, or None"
    expect(source, value, isinstance(value, Iterable) and not isinstance(value, str | Mapping), each_is)
    count = 0
    for count, verdict in enumerate(value, 1):
        if count > len(questions):
            raise PluginError(f"{source} returned more verdicts than the {len(questions)} questions")
        answers = len(questions[count - 1].answers)
        if verdict is not None:
            expect(source, verdict, _are_ranks(verdict, answers), f"{each_is}; this question has {answers} answers")
        yield verdict
    if count < len(questions):
        raise PluginError(f"{source} returned {count} verdicts for {len(questions)} questions")


def _are_ranks(verdict: Any, answers: int) -> bool:
    numbers_only = isinstance(verdict, Sequence) and all(isinstance(rank, numbers.Real) for rank in verdict)
    return numbers_only and len(verdict) == answers and all(map(math.isfinite, verdict))


def rows(source: str, value: Any) -> list[Row]:
    """Check the result of a format's ``convert``: a row, or a list of rows, which may be empty."""
    converted = value if isinstance(value, list) else [value]
    expect(
        source, value, all(isinstance(each, _ROWS) for each in converted), "a row, such as a Demonstration, or a list"
    )
    return converted


def load_arguments(source: str, value: Any) -> dict[str, Any]:
    """Check the result of a tuner's ``load``: arguments of ``from_pretrained``."""
    expect(source, value, isinstance(value, dict), "a dict of arguments of from_pretrained")
    return dict(value)


def model(source: str, value: Any) -> Any:
    """Check the result of a tuner's ``wrap``: a module."""
    from torch import nn

    expect(source, value, isinstance(value, nn.Module), "a torch.nn.Module")
    return value


# Metrics of the Trainer and the stages: those of a loss would replace them in logs, decisions and results.
LOGGED = {
    *("loss", "step", "epoch", "learning_rate", "grad_norm", "num_tokens", "mean_token_accuracy", "perplexity"),
    *("accuracy", "margin", "reference_point", "pairs", "score", "kl", "kl_coef", "length", "eos_rate", "entropy"),
    *("equal_scores", "redrawn", "reward_errors", "explained_variance", "rewards", "logps", "shift", "total_flos"),
    *("contrast_loss", "fit_loss", "kl_loss", "ptx_loss", "rollout_logps_difference", "sampled_tokens_per_second"),
}
LOGGED_PREFIXES = ("eval_", "train_", "seconds_", "rewards_", "logps_", "importance_")


def is_logged(metric: str) -> bool:
    """Whether the Trainer or a stage logs a metric of this name."""
    return metric in LOGGED or metric.startswith(LOGGED_PREFIXES) or metric.endswith("_grad_norm")


def loss(source: str, function: Callable[[Any], Any]) -> Callable[[Any], LossOutput]:
    """Wrap a loss to check its results: a scalar, with a gradient if the batch has one, and numbers as metrics."""
    import torch

    def checked(batch: Any) -> LossOutput:
        output = function(batch)
        if not isinstance(output, LossOutput):
            expect(source, output, False, "LossOutput(loss, metrics)")
        value = output.loss
        if not (isinstance(value, torch.Tensor) and value.numel() == 1):
            shape = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
            raise PluginError(f"{source} returned a loss of {shape}, expected a scalar tensor")
        if torch.is_grad_enabled() and not value.requires_grad and _has_gradients(batch):
            raise PluginError(f"{source} returned a loss without a gradient. Is it detached?")
        for name, number in output.metrics.items():
            if not (isinstance(number, numbers.Real) or (isinstance(number, torch.Tensor) and number.numel() == 1)):
                raise PluginError(f"{source} returned the metric '{name}' as {shown(number)}, expected a number")
            if is_logged(name):
                raise PluginError(f"{source} returned the metric '{name}', which the stages log themselves. Rename it")
        return output

    return checked


def _has_gradients(batch: Any) -> bool:
    return any(getattr(value, "requires_grad", False) for value in vars(batch).values())


def optimizer(source: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """Check the result of an optimizer's ``build``: a class or a factory, and a dict of arguments."""
    from torch.optim import Optimizer

    valid = isinstance(value, tuple | list) and len(value) == 2 and callable(value[0]) and isinstance(value[1], dict)
    valid = valid and (not isinstance(value[0], type) or issubclass(value[0], Optimizer))
    expect(source, value, valid, "a tuple of a torch.optim.Optimizer class or a factory, and a dict of its arguments")
    return value[0], value[1]


def name_optimizer(source: str, trainer: Any) -> None:
    """Make errors of the trainer's ``create_optimizer`` name the plugin of the optimizer."""
    from torch.optim import Optimizer

    create = trainer.create_optimizer

    def named(*arguments: Any, **keywords: Any) -> Any:
        try:
            created = create(*arguments, **keywords)
        except AlignkitError:
            raise
        except Exception as error:
            raise PluginError(f"{source} could not be created: {one_line(error)}") from error
        expect(source, created, isinstance(created, Optimizer), "a torch.optim.Optimizer")
        return created

    trainer.create_optimizer = named


def engine(source: str, function: Callable[..., Any], sampling: Sampling) -> Engine:
    """Wrap a rollout engine to check its answers: their number, lengths, token ids, ends and log-probabilities."""

    function = with_roles(function)

    def checked(policy: Any, prompts: list[list[int]], roles: Any = None) -> SampledAnswers:
        answers = function(policy, prompts, roles=roles)
        ids = isinstance(answers, list) and all(
            isinstance(answer, list) and all(type(token) is int for token in answer) for answer in answers
        )
        expect(source, answers, ids, "a list of answers, each a list of token ids")
        expected, limit = len(prompts) * sampling.samples, sampling.max_new_tokens
        if len(answers) != expected:
            raise PluginError(
                f"{source} returned {len(answers)} answers, expected {expected} ({sampling.samples} per prompt)"
            )
        vocabulary = policy.get_input_embeddings().weight.shape[0]
        for answer in answers:
            if not 0 < len(answer) <= limit:
                raise PluginError(f"{source} returned an answer of {len(answer)} tokens, expected 1 to {limit}")
            if any(token in sampling.stop_ids for token in answer[:-1]):
                raise PluginError(f"{source} returned an answer that continues after a stop token")
            if not 0 <= min(answer) <= max(answer) < vocabulary:
                raise PluginError(f"{source} returned a token id outside the vocabulary of {vocabulary} tokens")
        logps = getattr(answers, "logps", None)
        if logps is not None and not _fit(logps, answers):
            raise PluginError(f"{source} returned log-probabilities that are not a number <= 0 for each token")
        off_policy = getattr(answers, "off_policy", None)
        if off_policy is not None and logps is None:
            raise PluginError(f"{source} returned answers of a copy of the policy without their log-probabilities")
        return SampledAnswers(answers, logps, off_policy)

    return checked


def _fit(logps: Any, answers: list[list[int]]) -> bool:
    """Whether log-probabilities are one for each token; rounding may make a certain token's slightly positive."""
    lengths = isinstance(logps, list) and [len(row) for row in logps] == [len(answer) for answer in answers]
    return lengths and all(-math.inf < logp < 1e-3 for row in logps for logp in row)


def trainer(source: str, value: Any) -> Any:
    """Check the result of a stage's ``build``: a trainer."""
    import transformers

    expect(source, value, isinstance(value, transformers.Trainer), "a transformers.Trainer")
    return value


def manifest_keys(source: str, value: Any) -> dict[str, Any]:
    """Check the result of a stage's ``finish``: keys for the manifest, or None."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{source} returned a value that cannot be written as JSON: {error}") from error
    expect(source, value, value is None or isinstance(value, dict), "a dict or None")
    return value or {}


def declared_components(plugin: Plugin, hook: str, kind: type[Component], value: Any) -> Iterator[Component]:
    """Check the components that a declaration hook returned.

    Raises:
        PluginError: the result is not a list of components of that kind, or a field has the wrong type.
    """
    valid = isinstance(value, list | tuple) and all(isinstance(each, kind) for each in value)
    expect(f"{plugin}: {hook}", value, valid, f"a list of {kind.__name__}")
    for component in value:
        for name, expected in _wrong_fields(component):
            actual = shown(getattr(component, name))
            of = f"{component.kind} '{component.name}'"
            raise PluginError(f"{plugin}: the {name} of {of} is {actual}, expected {expected}")
        yield component


def _wrong_fields(component: Component) -> Iterator[tuple[str, str]]:
    """The fields of a component with a wrong type: (name, what was expected)."""
    if not (isinstance(component.config, type) and dataclasses.is_dataclass(component.config)):
        yield "config", "a dataclass"
    for field in dataclasses.fields(component):
        value, kind = getattr(component, field.name), str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        if kind.startswith("Callable") and not callable(value):
            yield field.name, "a function"
        elif kind.startswith("str") and not isinstance(value, str):
            yield field.name, "a string"
        elif kind.startswith("tuple") and not isinstance(value, tuple | list):
            yield field.name, "a tuple (with a comma after a single item)"
        elif kind.startswith("Mapping") and not isinstance(value, Mapping):
            yield field.name, "a dict"
