"""The policies along a run: the one that it starts from, its checkpoints, and its result. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.errors import AlignkitError, ConfigError
from alignkit.evaluation import comparison
from alignkit.evaluation.error_bars import standard_error
from alignkit.evaluation.paired import Answered, mean
from alignkit.generation import scorers
from alignkit.generation.scorers import Scorer
from alignkit.judging.choosing import Chosen
from alignkit.runs import fingerprints, lineage, manifest, resume
from alignkit.runs.frontier import Point
from alignkit.runs.lineage import Parent

KEEP = "train.save_total_limit=null keeps every checkpoint that a run writes"
SIGNIFICANT = 3  # standard errors: the best of many checkpoints is partly chance

Measure = Scorer | Chosen


class Policy(NamedTuple):
    """A policy that answers prompts: that of a finished run, of a checkpoint of it, or of the run's base."""

    run: Parent
    checkpoint: Path | None = None
    is_base: bool = False  # the model that the run was trained on, without the run's adapter

    @property
    def record(self) -> dict[str, Any]:
        """The manifest of the run."""
        assert self.run.manifest is not None
        return self.run.manifest

    @property
    def folder(self) -> Path:
        """The folder that PEFT or Transformers can open; of some checkpoints that is the run."""
        checkpoint = self.checkpoint
        return checkpoint if checkpoint and not manifest.missing_file(checkpoint) else self.run.folder

    @property
    def name(self) -> str:
        """The folder or the name of the model."""
        return self.record["base"]["name"] if self.is_base else str(self.checkpoint or self.run.folder)


Along = list[tuple[int, Policy]]  # the policies along a run, each with its step


def policies_of(run: Parent) -> Along:
    """The policies along a run: its start, its checkpoints, and its result.

    Raises:
        ConfigError: the run keeps no checkpoint, or the model that it starts from is gone or has changed.
    """
    kept = resume.checkpoints(run.folder)
    if not kept:
        raise ConfigError(
            f"{run.folder} keeps no checkpoints: it was trained with train.save_strategy=no. Without that setting, it "
            f"keeps the last two, and {KEEP}"
        )
    if unknown := [
        each for each in kept if manifest.missing_file(each) and not (each / resume.TRAINED_WEIGHTS).exists()
    ]:
        raise ConfigError(
            f"{unknown[0]} has no policy that PEFT or Transformers can open. Tell the author of stage '{run.stage}' to "
            "derive its trainer from alignkit.online.RolesTrainer"
        )
    along = [(resume.step_of(checkpoint), Policy(run, checkpoint)) for checkpoint in kept]
    result = Policy(run)
    return [(0, start_of(run)), *along, (result.record["steps"], result)]


def start_of(run: Parent) -> Policy:
    """The policy that a run starts from.

    Raises:
        ConfigError: it is gone or has changed, so that no KL to it can be measured.
    """
    policy = Policy(run)
    record, parent = policy.record, policy.record["parents"].get("policy")
    if parent is None or (record["weights"] == "adapter" and record["base"]["located"] == parent["folder"]):
        return Policy(run, is_base=True)
    recorded = Path(parent["folder"])
    folders = [folder for folder in (recorded, run.folder.parent / recorded.name) if manifest.is_run(folder)]
    message = f"the KL of {run.folder} to its start cannot be measured: {recorded}"
    if not folders:
        raise ConfigError(f"{message}, from which it starts, is gone")
    for folder in folders:
        if fingerprints.weights(folder) == parent["weights"]:
            return Policy(lineage.named("compare", str(folder), "policy"))
    raise ConfigError(f"{message}, from which it starts, was trained again since")


def measures_of(
    runs: Sequence[Parent], scorer: Scorer | None, judge: Chosen | None, trusted: bool
) -> tuple[list[Measure], list[str]]:
    """The reward of the policies, then the gold reward or judge, if there is one. The second list has warnings.

    The first is the reward that the runs were trained on. ``scorer`` and ``judge`` are those that the user names. The
    code that a run names is run only if the runs are ``trusted``.

    Raises:
        AlignkitError: there is nothing to score with, or too much.
    """
    named: list[Measure] = [measure for measure in (scorer, judge) if measure is not None]
    warnings = list[str]()
    try:
        of_training = _training_reward(runs, trusted)
    except AlignkitError as error:
        if not named:
            raise
        of_training, warnings = None, [f"no curve by the reward of training: {error}"]
    if of_training is None:
        return named or [comparison.newest_reward(runs)], warnings
    gold = [measure for measure in named if not (isinstance(measure, Scorer) and measure.reward == of_training.reward)]
    if len(gold) > 1:
        raise ConfigError("compare --checkpoints: --reward and --judge are both the gold curve: remove one of them")
    if any(describe(measure) == describe(of_training) for measure in gold):  # such as `sum` with other parts
        of_training = of_training._replace(name=f"{of_training.name} of training")
    return [of_training, *gold], warnings


def _training_reward(runs: Sequence[Parent], trusted: bool) -> Scorer | None:
    first, *others = (scorers.of_training(run, trusted) for run in runs)
    if any((other and other.reward) != (first and first.reward) for other in others):
        raise ConfigError("these runs were trained on different rewards: name one for all with --reward")
    return first


def describe(measure: Measure) -> str:
    """A label for the values of a measure, for a table and a picture."""
    return f"score by {measure.name}" if isinstance(measure, Scorer) else f"wins by {measure.name} over the start"


def frontier_rows(
    policies: Along,
    answered: Sequence[Answered],
    measures: Sequence[Measure],
    values: Sequence[Sequence[Sequence[float | None]]],
) -> list[dict[str, Any]]:
    """The lines of ``frontier.jsonl``. ``values`` are those of each measure for each policy and prompt.

    If the last checkpoint is the result, as its answers show, only the result is listed.
    """
    columns = {
        **{"score_by": describe(measures[0]), "gold_by": describe(measures[1]) if len(measures) > 1 else None},
        "rewards": [measure.reward if isinstance(measure, Scorer) else None for measure in measures],
    }
    rows = []
    for number, ((step, policy), own) in enumerate(zip(policies, answered, strict=True)):
        if number == len(policies) - 2 and _same_policy(own, answered[-1]) and step == policies[-1][0]:
            continue
        row: dict[str, Any] = {"step": step, "policy": policy.name, **mean("kl", own.kl)}
        for place, name in enumerate(("score", "gold")):
            of_policy = values[place][number] if place < len(values) else []
            row |= mean(name, [value for value in of_policy if value is not None])
        row |= {**mean("length", own.lengths), "eos_rate": sum(own.ended) / len(own.ended), "prompts": len(own.ended)}
        rows.append(row | columns)
    return rows


def _same_policy(a: Answered, b: Answered) -> bool:
    return a.answer_ids == b.answer_ids and a.kl == b.kl


def point_of(row: dict[str, Any]) -> Point:
    """A row as a point of the frontier."""
    return Point(*(row[name] for name in Point._fields))


def overoptimization(policies: Along, gold: Sequence[Sequence[float | None]], measure: Measure) -> str | None:
    """A sentence, if the gold measure of the result is clearly below that of an earlier policy of the run."""
    means = [_mean([value for value in of_policy if value is not None]) for of_policy in gold]
    best = max(range(len(means)), key=lambda number: means[number])
    pairs = zip(gold[best], gold[-1], strict=True)
    falls = [top - last for top, last in pairs if top is not None and last is not None]
    if len(falls) < 2 or not (fall := _mean(falls)) > SIGNIFICANT * (error := standard_error(falls)):
        return None
    step, _ = policies[best]
    return (
        f"over-optimized: the {describe(measure)} fell by {fall:.2f} ± {error:.2f} from step {step} to the end of the "
        "run, paired by prompt"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else -math.inf
