"""Builds rewards: functions of answers and roles whose scores are checked. Importing this module imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from alignkit.batches import Answers
from alignkit.components import Reward
from alignkit.config.reward_parts import part
from alignkit.config.settings import Selected
from alignkit.errors import ConfigError, DataError, PluginError
from alignkit.generation import rankings
from alignkit.protocols import RewardFunction, Run
from alignkit.registry import checks
from alignkit.runs import lineage

if TYPE_CHECKING:
    from torch import nn


def build(reward: Selected, run: Run, which: str = "") -> RewardFunction:
    """A reward from its settings. ``which`` distinguishes it in errors from other rewards with its name."""
    component, config = reward
    score = checks.function(run.registry.describe(component, "build"), component.build(config, run))
    return checked(run.registry.describe(component, which=which), score)


def checked(source: str, score: Callable[..., Any]) -> RewardFunction:
    """``score`` as a reward that raises a DataError, which names ``source``, unless each score is a finite number."""
    score = checks.with_roles(score)

    def scores(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        return rankings.checked(source, lambda: checks.scores(source, score(answers, roles=roles)), answers.texts)

    return scores


def build_reward(run: Run, table: Mapping[str, Any], own: Collection[str] = ()) -> RewardFunction:
    """Build the reward that a table in another reward's config names, for a reward that combines others.

    Args:
        table: the name and the settings, such as ``{"name": "function", "call": "module:function"}``.
        own: keys of the table that belong to the outer reward, such as a weight.

    Raises:
        ConfigError: the table has no name, or a key or a value that the reward does not take.
        PluginError: no active plugin has that reward.
    """
    which = next((f" {table[name]}" for name in ("call", "path", "model") if table.get(name)), "")
    return build(part(run.registry, table, own), run, which)


def of_function(function: Callable[..., Any]) -> Reward:
    """A Python function of prompts and answers as a reward, under its own name."""
    score = rankings.scorer(function)
    name = getattr(function, "__name__", type(function).__name__)
    name = re.sub(r"[^\w-]+", "", name)  # a lambda is called "<lambda>"
    return Reward(name=name, summary="a Python function in memory", build=lambda config, run: score)


def skipping(score: RewardFunction, say: Callable[[str], None]) -> RewardFunction:
    """``score``, with NaN for the answers that it rejects, unless it rejects all. Says the first error.

    Those without a finite score are rejected. If a batch fails, each answer is scored separately to find them. The
    others are then scored together again, since a reward may compare the answers of a batch.
    """
    warned = False

    def rejection(answer: Answers, roles: nn.Module | None) -> str:
        try:
            score(answer, roles)
        except DataError as error:
            return str(error)
        return ""

    def scores(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        nonlocal warned
        try:
            return score(answers, roles)
        except DataError as error:
            indices = range(len(answers.texts))
            if isinstance(error, rankings.NotFiniteError):
                rejected = {i: str(error) for i in indices if not math.isfinite(error.scores[i])}
            else:
                rejected = {i: reason for i in indices if (reason := rejection(answers.take([i]), roles))}
            if len(rejected) in (0, len(indices)):  # the error is not about single answers
                raise
        if not warned:
            warned = True
            say(f"warning: skipped an answer, and will skip others like it: {next(iter(rejected.values()))}")
        accepted = iter(scores(answers.take([i for i in indices if i not in rejected]), roles))
        return [math.nan if i in rejected else next(accepted) for i in indices]

    return scores


def of_role(run: Run, path: str | None) -> RewardFunction:
    """The scores of the reward model in the run folder ``path``, one of the run's parents; None if there is only one.

    The function needs ``roles``, one of which is that model.
    """
    import torch

    from alignkit.models import Roles

    runs = lineage.rewards_in(run.parents)
    names = [role for role, folder in runs.items() if path in (None, str(folder))]
    if len(names) != 1:
        known = ", ".join(map(str, runs.values())) or "none"
        raise ConfigError(f"a reward asks for the reward run {path or 'that it needs'}. Its `needs` named: {known}")
    size = run.config.train.get("per_device_eval_batch_size", 8)

    def score(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        if not isinstance(roles, Roles):
            raise PluginError(
                f"the reward model in {runs[names[0]]} was called without roles: a stage, an engine or a reward that "
                "calls a reward must pass them, as in score(answers, roles)"
            )
        roles, scores = roles.eval(), list[float]()
        for start in range(0, len(answers.texts), size):
            batch = slice(start, start + size)
            ids = answers.prompt_ids[batch], answers.answer_ids[batch]
            sequences = roles.sequences(*ids, run.tokenizer.pad_token_id, run.device, names[0])
            with torch.no_grad(), torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not torch.float32):
                scores += roles(sequences, names)[names[0]].tolist()
        return scores

    return score
