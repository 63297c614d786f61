"""The object that rewards and judges get in place of a run outside training. No torch here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.batches import Answers
from alignkit.errors import ConfigError
from alignkit.generation import rewards
from alignkit.protocols import RewardFunction
from alignkit.registry import Registry
from alignkit.runs import lineage
from alignkit.runs.lineage import Parent


def scores_of_run(run: Parent, batch: int) -> RewardFunction:
    """The scores of the reward model of a finished run, in batches of ``batch`` answers."""
    from alignkit.generation.scoring import RewardModel

    assert run.manifest is not None
    model = RewardModel(run.folder, run.manifest)

    def score(answers: Answers) -> list[float]:
        encoded = [model.encode(prompt, text) for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
        return model.scores(encoded, batch)

    return rewards.checked(f"the reward model in {run.folder}", score)


class OnlyInTrainingError(ConfigError, AttributeError):
    """A reward or a judge asked for a member of its run that exists only in training."""


@dataclass
class RunOutsideTraining:
    """The argument of ``build`` of a judge, and of a reward outside training, in place of a run."""

    registry: Registry
    name: str  # the component, for messages
    batch: int  # answers per batch of a reward model
    say: Callable[[str], None]
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the ``train`` table, if there is one

    @functools.cached_property
    def device(self) -> Any:
        """The device."""
        from alignkit.models.device_and_dtype import run_device

        return run_device(self.train)

    @functools.cached_property
    def dtype(self) -> Any:
        """The dtype of computation."""
        from alignkit.models.device_and_dtype import run_dtype

        return run_dtype(self.train)

    def reward_run(self, path: str | None) -> RewardFunction:
        """The scores of the reward model in a run folder."""
        if path is None:
            raise ConfigError(f"{self.name} needs a reward run, and its settings name none")
        return scores_of_run(lineage.named(f"path of {self.name}", path, "reward"), self.batch)

    def __getattr__(self, member: str) -> Any:
        raise OnlyInTrainingError(f"{self.name} works only in training: it uses run.{member}")
