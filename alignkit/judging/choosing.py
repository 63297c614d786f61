"""Finding and building the judge that a name or a table in a config selects. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from alignkit.batches import Question
from alignkit.components import Judge
from alignkit.config.resolve import parse_override
from alignkit.config.reward_parts import judge_of
from alignkit.config.settings import Selected, merge, plain, select
from alignkit.errors import AlignkitError, ConfigError, PluginError, one_line
from alignkit.generation import rankings, scorers
from alignkit.generation.outside_training import RunOutsideTraining
from alignkit.judging.comparing import Verdict, Way
from alignkit.protocols import RewardFunction, Run
from alignkit.registry import Registry, checks
from alignkit.registry.in_memory import PluginInMemory
from alignkit.runs import lineage, manifest


@dataclass(frozen=True)
class Chosen:
    """A judge with its settings, which is not built yet."""

    registry: Registry
    name: str  # as the user wrote it
    component: Judge
    config: Any
    loads: bool = True  # whether building it takes time, such as for loading a model

    @property
    def source(self) -> str:
        """The judge and its plugin, for messages."""
        return self.registry.describe(self.component)

    @functools.cached_property
    def way(self) -> Way:
        """The settings for its questions."""
        largest = self.component.largest(self.config)
        source = self.registry.describe(self.component, "largest")
        checks.expect(source, largest, largest is None or (type(largest) is int and largest > 1), "None or 2 or more")
        return Way(largest, self.component.order_matters, self.component.graded)

    @functools.cached_property
    def identity(self) -> str | None:
        """Everything that its verdicts depend on beside the question; None: they are not stored.

        Without a function ``identity`` this includes the code of its plugin, so that a changed judge is asked again,
        and the verdicts of a plugin in memory are not stored.
        """
        if self.component.identity is None:
            provider = self.registry.provider(self.component)
            if isinstance(provider, PluginInMemory):
                return None
            settings = {f.name: f.metadata.get("resume", "same") for f in dataclasses.fields(self.component.config)}
            kept = {key: value for key, value in plain(self.config).items() if settings[key] == "same"}
            module = provider.entry_point.module.partition(".")[0]
            own: str | None = json.dumps([kept, _code_of(module)], sort_keys=True)
        else:
            own = self.component.identity(self.config)
            source = self.registry.describe(self.component, "identity")
            checks.expect(source, own, own is None or isinstance(own, str), "a string or None")
        if own is None:
            return None
        return json.dumps([self.component.name, self.registry.provider(self.component).distribution, own])

    def tokens(self, question: Question) -> int | None:
        """The tokens that asking a question sends; None if the judge does not say."""
        if self.component.tokens is None:
            return None
        count = self.component.tokens(self.config, question)
        checks.expect(self.registry.describe(self.component, "tokens"), count, type(count) is int, "an int")
        return count

    def open(
        self, batch: int, say: Callable[[str], None], train: Mapping[str, Any] | None = None
    ) -> Callable[[Sequence[Question]], Iterator[Verdict]]:
        """Build the judge: a function that yields a checked verdict for each question.

        Args:
            batch: answers per batch of a reward model.
            say: prints a line for the user.
            train: the ``train`` table of the run that asks, if there is one.
        """
        named = f"judge '{self.component.name}'"
        run = RunOutsideTraining(self.registry, named, batch, say, train or {})
        built = self.component.build(self.config, cast(Run, run))
        judge = checks.function(self.registry.describe(self.component, "build"), built)
        source = self.source

        def verdicts(questions: Sequence[Question]) -> Iterator[Verdict]:
            try:
                yield from checks.verdicts(source, judge(questions), questions)
            except AlignkitError:
                raise
            except Exception as error:
                raise PluginError(f"{source} failed: {one_line(error)}") from error

        return verdicts


def named(key: str, name: str, plugins: Sequence[str] = (), overrides: Sequence[str] = ()) -> Chosen:
    """The judge that the option ``key`` names: a judge, or what :func:`alignkit.generation.scorers.named` takes.

    ``plugins`` are activated. ``overrides`` are settings of a judge (``judge.model=...``) or of a reward. A name that a
    judge and a reward have is that of the judge, unless there are settings of the reward.

    Raises:
        AlignkitError: there is no such judge or scorer, or its settings are invalid.
    """
    registry = Registry()
    registry.activate(*plugins)
    of_reward = any(override.startswith("reward.") for override in overrides)
    if not registry.has("judge", name) or of_reward or manifest.is_run(Path(name)):
        return _of_scorer(registry, scorers.named(registry, key, name, overrides, kinds=("judge", "reward")))
    settings = merge(*map(parse_override, overrides))
    if wrong := [top for top in settings if top != "judge"]:
        raise ConfigError(f"unknown key {wrong[0]}: the settings of {key} {name} are judge.KEY=VALUE")
    judge = select(registry, "judge", name, [settings.get("judge", {})])
    if judge.component.name != name:
        raise ConfigError(f"judge.name is {judge.component.name}, but {key} is {name}. Remove judge.name")
    return _checked(registry, judge, "judge")


def judge_of_table(registry: Registry, table: Mapping[str, Any]) -> Chosen:
    """The judge that a table in a reward's config names, such as ``{"name": "local", "model": "runs/sft"}``.

    Raises:
        AlignkitError: there is no such judge, or its settings are invalid.
    """
    return _checked(registry, judge_of(registry, table, "reward.judge"), "reward.judge")


def _checked(registry: Registry, judge: Selected, key: str) -> Chosen:
    """A judge whose settings, packages and runs are checked."""
    component, config = judge
    registry.check_requires(component)
    try:
        checks.settings(component, config)
    except ConfigError as error:
        raise ConfigError(str(error).replace(" judge.", f" {key}.")) from error
    for role, stage in checks.needs(registry.describe(component, "needs"), component.needs(config)).items():
        if config.path is None:
            raise ConfigError(f"judge '{component.name}' needs a run of stage {stage}: add {key}.path=RUN")
        lineage.named(f"{key}.path", config.path, role)
    return Chosen(registry, component.name, component, config)


def _of_scorer(registry: Registry, scorer: scorers.Scorer) -> Chosen:
    def build(config: Any, run: Any) -> Callable[[Sequence[Question]], Iterator[Verdict]]:
        return by_scores(scorer.open(run.batch, run.say))

    component = Judge(
        name=scorer.name,
        summary="a score of each answer",
        build=build,
        largest=lambda config: None,
        order_matters=False,
        identity=lambda config: None,
    )
    return Chosen(registry, scorer.name, component, component.config(), scorer.loads)


def by_scores(
    score: RewardFunction | Callable[..., Sequence[float]], name: str = "the scorer"
) -> Callable[[Sequence[Question]], Iterator[Verdict]]:
    """A judge that ranks answers by their score, the highest first; equal scores are a tie.

    It raises a DataError, which names the scorer by ``name``, unless each score is a finite number.
    """

    def judge(questions: Sequence[Question]) -> Iterator[Verdict]:
        for question in questions:
            answers = scorers.of_texts(question.prompt, list(question.answers), question.fields)
            yield rankings.ranks(rankings.checked(name, functools.partial(score, answers), answers.texts))

    return judge


def _code_of(package: str) -> str:
    """A fingerprint of the Python files of an imported package or module."""
    module = sys.modules[package]
    folders = list(getattr(module, "__path__", []))
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))]
    if not folders and module.__file__:
        files = [Path(module.__file__)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
