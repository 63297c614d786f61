"""What scores answers outside a training run: a function, a reward run, or a reward of a plugin. No torch here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from alignkit.batches import Answers
from alignkit.config import reward_parts
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge, select
from alignkit.data.prompts import prompt_text
from alignkit.errors import ConfigError, did_you_mean
from alignkit.generation import rankings, rewards
from alignkit.protocols import RewardFunction
from alignkit.registry import Registry
from alignkit.rows import Conversation
from alignkit.runs import lineage, manifest
from alignkit.runs.lineage import Parent
from alignkit.runs.plan import check_requires


class Judge(NamedTuple):
    """What scores answers, and how it is called."""

    name: str
    # answers at a time, one line for the user -> the function
    open: Callable[[int, Callable[[str], None]], Callable[[Answers], list[float]]]
    loads: bool = True  # a model, or whatever a plugin's reward loads


def named(key: str, name: str, plugins: Sequence[str] = (), overrides: Sequence[str] = ()) -> Judge:
    """The ``module:function``, the reward run's folder or the reward component that an option ``key`` names.

    ``plugins`` are activated; ``overrides`` (``reward.label=1``) are the settings of a component.

    Raises:
        AlignkitError: there is no such thing, or it cannot score; settings for what has none.
    """
    registry = Registry()
    registry.activate(*plugins)
    if registry.has("reward", name) and not manifest.is_run(Path(name)):
        return _component(registry, key, name, overrides)
    if overrides:
        known = ", ".join(reward.name for reward in registry.all("reward"))
        raise ConfigError(f"{overrides[0]} is a setting of a reward, and {key} {name} names none. Rewards: {known}")
    if ":" in name and not Path(name).exists():
        function = rankings.import_scorer(name)

        def score(answers: Answers) -> list[float]:
            prompts = [prompt_text(prompt) for prompt in answers.prompts]
            return rankings.checked(name, functools.partial(function, prompts, answers.texts), answers.texts)

        return Judge(name, lambda batch, say: score, loads=False)
    if not Path(name).exists() and "/" not in name:
        rewards_known = [reward.name for reward in registry.all("reward")]
        raise ConfigError(
            f"{key}: '{name}' is not module:function, no finished run, and no reward of an active plugin."
            f"{did_you_mean(name, rewards_known)} Rewards: {', '.join(rewards_known)}"
        )
    return of_run(lineage.named(key, name, "reward"))


def of_run(run: Parent) -> Judge:
    """A reward run: the scores that ``alignkit score`` gives."""
    return Judge(str(run.folder), lambda batch, say: _scorer(run, batch))


def _scorer(run: Parent, batch: int) -> RewardFunction:
    from alignkit.generation.scoring import Scorer

    assert run.manifest is not None
    scorer = Scorer(run.folder, run.manifest)

    def score(answers: Answers, roles: object = None) -> list[float]:
        encoded = [scorer.encode(*both) for both in zip(answers.prompts, answers.texts, strict=True)]
        return scorer.scores(encoded, batch)

    return score


def _component(registry: Registry, key: str, name: str, overrides: Sequence[str]) -> Judge:
    settings = merge(*map(parse_override, overrides))
    if wrong := [top for top in settings if top != "reward"]:
        raise ConfigError(f"unknown key {wrong[0]}: the settings of {key} {name} are reward.KEY=VALUE")
    reward = select(registry, "reward", name, [settings.get("reward", {})])
    if reward.component.name != name:
        raise ConfigError(f"reward.name is {reward.component.name}, and {key} is {name}: name it there alone")
    if getattr(reward.config, "on_error", "stop") != "stop":
        raise ConfigError("reward.on_error is for training: here an answer that the reward refuses stops the command")

    def find(stage: str, role: str, named: str | None, key: str) -> str:
        if named is None:
            raise ConfigError(f"reward '{name}' needs a run of stage {stage}: add {key}=RUN")
        return str(lineage.named(key, named, role).folder)

    reward = reward_parts.with_runs(registry, reward, find)
    for component, config in reward_parts.with_parts(registry, reward):
        check_requires(registry, component)
        if component.check:
            component.check(config)
    return Judge(name, lambda batch, say: rewards.build(reward, cast(Any, Alone(registry, name, batch, say))))


class OnlyInTrainingError(ConfigError, AttributeError):
    """A reward asked for something of its run that is there in training alone."""


@dataclass
class Alone:
    """What ``build`` of a reward is given in place of a run, outside training."""

    registry: Registry
    name: str
    batch: int
    say: Callable[[str], None]

    @functools.cached_property
    def device(self) -> Any:
        """As of a run."""
        from alignkit.models.device import run_device

        return run_device({})

    @functools.cached_property
    def dtype(self) -> Any:
        """As of a run."""
        from alignkit.models.device import run_dtype

        return run_dtype({})

    def reward_run(self, path: str | None) -> RewardFunction:
        """As of a run."""
        if path is None:
            raise ConfigError(f"reward '{self.name}' asks for a reward run that its settings do not name")
        return _scorer(lineage.named("reward.path", path, "reward"), self.batch)

    def __getattr__(self, what: str) -> Any:
        raise OnlyInTrainingError(f"reward '{self.name}' works in training alone: it asks for run.{what}")


@dataclass(frozen=True)
class TextAnswers(Answers):
    """Answers that were read from a file: there are no tokens of a policy."""

    prompt_ids: list[list[int]] = dataclasses.field(init=False, repr=False)
    answer_ids: list[list[int]] = dataclasses.field(init=False, repr=False)

    def __getattr__(self, what: str) -> Any:
        raise OnlyInTrainingError(f"this reward reads {what}, tokens of a policy, and a file has texts alone")


def of_texts(prompt: str | Conversation, texts: list[str]) -> TextAnswers:
    """Answers to one prompt."""
    messages: Conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return TextAnswers([messages] * len(texts), texts)
