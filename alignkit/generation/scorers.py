"""Score answers outside a training run: by a function, a reward run, or a plugin's reward. No torch here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from alignkit.batches import Answers
from alignkit.config import reward_parts, trust
from alignkit.config.resolve import parse_override
from alignkit.config.settings import Selected, merge, select
from alignkit.errors import ConfigError, did_you_mean
from alignkit.generation import rankings, rewards
from alignkit.generation.outside_training import OnlyInTrainingError, RunOutsideTraining, scores_of_run
from alignkit.registry import Registry, checks
from alignkit.rows import Conversation
from alignkit.runs import fingerprints, lineage, manifest
from alignkit.runs.lineage import Parent


class Scorer(NamedTuple):
    """Something that scores answers, and its name."""

    name: str
    # batch size, a function that prints a line -> the function that scores
    open: Callable[[int, Callable[[str], None]], Callable[[Answers], list[float]]]
    loads: bool = True  # whether opening it takes time, such as for loading a model
    # the table of the reward in a config, with fingerprints of weights in place of run folders: equal for equal scores
    reward: Mapping[str, Any] | None = None


def named(
    registry: Registry, key: str, name: str, overrides: Sequence[str] = (), kinds: Sequence[str] = ("reward",)
) -> Scorer:
    """The scorer that the option ``key`` names: ``module:function``, the folder of a reward run, or a reward component.

    ``overrides`` (``reward.label=1``) are the settings of a component. ``kinds`` are the kinds of components that the
    option takes, for the message if there is no such name.

    Raises:
        AlignkitError: it does not exist or cannot score; it has no settings, but there are overrides.
    """
    if registry.has("reward", name) and not manifest.is_run(Path(name)):
        return _component(registry, key, name, overrides)
    if overrides:
        known = ", ".join(reward.name for reward in registry.all("reward"))
        raise ConfigError(
            f"{overrides[0]} is a setting of a reward component, and {key} {name} is not one. Rewards: {known}"
        )
    if ":" in name and not Path(name).exists():
        function = rankings.import_scorer(name)

        def score(answers: Answers) -> list[float]:
            return rankings.checked(name, functools.partial(function, answers), answers.texts)

        return Scorer(name, lambda batch, say: score, loads=False, reward={"name": "function", "call": name})
    if not Path(name).exists() and "/" not in name:
        of_kind = {kind: [each.name for each in registry.all(kind)] for kind in kinds}
        hint = did_you_mean(name, [each for names in of_kind.values() for each in names])
        listed = ". ".join(f"{kind.capitalize()}s: {', '.join(names)}" for kind, names in of_kind.items())
        raise ConfigError(
            f"{key}: '{name}' is neither module:function, nor a finished run, nor a {' or a '.join(kinds)} of an "
            f"active plugin.{hint} {listed}"
        )
    return of_run(lineage.named(key, name, "reward"))


def of_run(run: Parent) -> Scorer:
    """A reward run as a scorer; its scores are those of ``alignkit score``."""
    reward = {"name": "reward-model", "path": fingerprints.weights(run.folder)}
    return Scorer(str(run.folder), lambda batch, say: scores_of_run(run, batch), reward=reward)


def _component(registry: Registry, key: str, name: str, overrides: Sequence[str]) -> Scorer:
    settings = merge(*map(parse_override, overrides))
    if wrong := [top for top in settings if top != "reward"]:
        raise ConfigError(f"unknown key {wrong[0]}: the settings of {key} {name} are reward.KEY=VALUE")
    reward = select(registry, "reward", name, [settings.get("reward", {})])
    if reward.component.name != name:
        raise ConfigError(f"reward.name is {reward.component.name}, but {key} is {name}. Remove reward.name")
    if getattr(reward.config, "on_error", "stop") != "stop":
        raise ConfigError("reward.on_error is only for training: here a rejected answer stops the command")

    def find(stage: str, role: str, named: str | None, key: str) -> str:
        if named is None:
            raise ConfigError(f"reward '{name}' needs a run of stage {stage}: add {key}=RUN")
        return str(lineage.named(key, named, role).folder)

    return _of_settings(registry, name, reward, find)


def of_training(run: Parent, trusted: bool) -> Scorer | None:
    """The reward that a run was trained on. None if its stage uses no reward.

    Raises:
        AlignkitError: it cannot score any more: a reward run or a plugin is gone, or the reward run was trained again.
            It needs trust (see :mod:`alignkit.config.trust`), and the run is not ``trusted``.
    """
    record = run.manifest
    assert record is not None
    table = record["config"]["stages"][record["stage"]].get("reward")
    if table is None:
        return None
    registry = Registry()
    registry.activate(*record["config"]["plugins"])
    settings = {key: value for key, value in table.items() if key not in ("name", "on_error")}

    def find(stage: str, role: str, named: str | None, key: str) -> str:
        parts = Path(named or "").parts
        parents = [each for each in record["parents"].values() if Path(each["folder"]).parts[-len(parts) :] == parts]
        folder = Path(parents[0]["folder"] if parents else named or "")
        found = lineage.named(key, str(folder), role).folder
        if parents and fingerprints.weights(found) != parents[0]["weights"]:
            raise ConfigError(f"{found} was trained again since it was the reward of {run.folder}")
        return str(found)

    selected = select(registry, "reward", table["name"], [settings])
    if not trusted:
        trust.check(reward_parts.with_judges(registry, selected))
    name = next((str(settings[key]) for key in ("path", "call", "model") if settings.get(key)), table["name"])
    return _of_settings(registry, name, selected, find)


def _of_settings(registry: Registry, name: str, selected: Selected, find: reward_parts.FindRun) -> Scorer:
    def weights(stage: str, role: str, named: str | None, key: str) -> str:
        return str(fingerprints.weights(Path(find(stage, role, named, key))))

    reward = reward_parts.with_runs(registry, selected, find)
    table = reward_parts.with_runs(registry, selected, weights).to_dict()
    for component, config in reward_parts.with_parts(registry, reward):
        registry.check_requires(component)
        checks.settings(component, config)

    def open_reward(batch: int, say: Callable[[str], None]) -> Callable[[Answers], list[float]]:
        outside = RunOutsideTraining(registry, f"reward '{reward.component.name}'", batch, say)
        return rewards.build(reward, cast(Any, outside))

    return Scorer(name, open_reward, reward={key: value for key, value in table.items() if key != "on_error"})


@dataclass(frozen=True)
class TextAnswers(Answers):
    """Answers from a file, without the tokens of a policy."""

    prompt_ids: list[list[int]] = dataclasses.field(init=False, repr=False)
    answer_ids: list[list[int]] = dataclasses.field(init=False, repr=False)

    def take(self, indices: Sequence[int]) -> TextAnswers:
        """The answers at these indices."""
        fields = None if self.fields is None else [self.fields[i] for i in indices]
        return TextAnswers([self.prompts[i] for i in indices], [self.texts[i] for i in indices], fields)

    def __getattr__(self, member: str) -> Any:
        raise OnlyInTrainingError(f"this reward uses {member}, the tokens of a policy, but a file has only texts")


def of_texts(prompt: str | Conversation, texts: list[str], fields: Mapping[str, Any] | None = None) -> TextAnswers:
    """Answers to one prompt, whose row has these other fields."""
    messages: Conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return TextAnswers([messages] * len(texts), texts, None if fields is None else [fields] * len(texts))
