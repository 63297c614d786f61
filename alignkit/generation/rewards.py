"""Rewards as functions whose scores are checked. Importing this module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from alignkit.batches import Answers
from alignkit.config.reward_parts import part
from alignkit.config.settings import Selected
from alignkit.errors import ConfigError, DataError, PluginError
from alignkit.generation import rankings
from alignkit.protocols import RewardFunction, Run
from alignkit.registry import handover
from alignkit.runs import lineage

if TYPE_CHECKING:
    from torch import nn


def build(reward: Selected, run: Run, which: str = "") -> RewardFunction:
    """A reward as a function of answers with checked scores; ``which`` tells it from others of its name in errors."""
    component, config = reward
    score = handover.with_roles(
        handover.function(run.registry.describe(component, "build"), component.build(config, run))
    )
    who = run.registry.describe(component, which=which)

    def scores(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        return rankings.checked(who, lambda: handover.scores(who, score(answers, roles=roles)), answers.texts)

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


def skipping(score: RewardFunction, say: Callable[[str], None]) -> RewardFunction:
    """``score`` that gives NaN for the answers that it refuses, as long as there are others; says the first refusal.

    Where a batch fails, each answer is scored alone to find those that are refused. The rest are then scored together
    again, since a reward may compare the answers of a batch.
    """
    said: list[str] = []

    def refusal(answers: Answers, roles: nn.Module | None) -> str:
        try:
            score(answers, roles)
        except DataError as error:
            return str(error)
        return ""

    def scores(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        try:
            return score(answers, roles)
        except DataError:
            numbers = range(len(answers.texts))
            refused = {number: why for number in numbers if (why := refusal(answers.take([number]), roles))}
            if len(refused) in (0, len(numbers)):  # it is not about single answers
                raise
        if not said:
            said.extend(refused.values())
            say(f"warning: skipped an answer, and will skip others like it: {said[0]}")
        rest = iter(score(answers.take([number for number in numbers if number not in refused]), roles))
        return [math.nan if number in refused else next(rest) for number in numbers]

    return scores


def of_role(run: Run, path: str | None) -> RewardFunction:
    """The scores of the reward run in the folder ``path``, one of the run's parents; without ``path``, of the only one.

    The function needs ``roles``, in which that run is one of the rewards.
    """
    import torch

    from alignkit.models import Roles, Sequences

    runs = lineage.rewards_in(run.parents)
    names = [role for role, folder in runs.items() if path in (None, str(folder))]
    if len(names) != 1:
        known = ", ".join(map(str, runs.values())) or "none"
        raise ConfigError(f"a reward asks for the reward run {path or 'that it needs'}. Runs that it named: {known}")
    size = run.config.train.get("per_device_eval_batch_size", 8)

    def score(answers: Answers, roles: nn.Module | None = None) -> list[float]:
        if not isinstance(roles, Roles):
            raise PluginError(
                f"the reward model in {runs[names[0]]} was called without roles: a stage, an engine or a reward that "
                "calls a reward has to pass them on, as in score(answers, roles)"
            )
        model, scores = roles.eval(), list[float]()
        for start in range(0, len(answers.texts), size):
            some = slice(start, start + size)
            ids = answers.prompt_ids[some], answers.answer_ids[some]
            sequences = Sequences.of(*ids, run.tokenizer.pad_token_id, run.device)
            with torch.no_grad(), torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not torch.float32):
                scores += model(sequences, names)[names[0]].tolist()
        return scores

    return score
