"""Plans the runs of a sweep, and checks all of them before the first one starts. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.config import grid
from alignkit.config.grid import Grid
from alignkit.config.resolve import RunConfig, parse_override, requested_stage
from alignkit.config.settings import merge
from alignkit.errors import AlignkitError, ConfigError
from alignkit.registry import Registry
from alignkit.runs import manifest
from alignkit.runs.plan import Plan, pipeline
from alignkit.runs.resume import check_folder
from alignkit.runs.up_to_date import is_made_by

FILE = "sweep.jsonl"  # in the output folder
# a run and those that it starts from have these in common
OF_PARENTS = ("model", "model_kwargs", "chat_template", "tuner")
State = Literal["waiting", "training", "finished", "failed"]


@dataclass(eq=False)
class Job:
    """A run of the sweep, or a run that others start from."""

    name: str
    config: RunConfig
    needs: list[Path]  # folders of runs that are trained first
    settings: dict[str, str] = field(default_factory=dict)  # the varied settings
    state: State = "waiting"
    error: str | None = None  # why it failed
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.folder

    @property
    def config_file(self) -> Path:
        """Its config, beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """The output of its process, beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        """Whether its folder is a finished run with these settings and data."""
        return manifest.is_run(self.folder) and is_made_by(self.config)

    def row(self) -> dict[str, Any]:
        """The line of this run in ``sweep.jsonl``."""
        settings = {key: grid.value_at(key, value) for key, value in self.settings.items()}
        row = {"run": str(self.folder), "settings": settings, "state": self.state, "error": self.error}
        record = manifest.read(self.folder) if self.state == "finished" else {}
        return {**row, "steps": record.get("steps"), "seconds": record.get("seconds"), "metrics": record.get("metrics")}


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, in order, and before them those that they start from."""

    output: Path
    stage: str
    parents: list[Job]
    jobs: list[Job]

    def write(self) -> None:
        """Write ``sweep.jsonl``."""
        lines = (json.dumps(manifest.plain_json(job.row()), ensure_ascii=False) + "\n" for job in self.jobs)
        manifest.write_atomically(self.output / FILE, "".join(lines))


def plan(file: Mapping[str, Any], cli: Mapping[str, Any], settings: Grid, output: Path, trusted: bool = False) -> Sweep:
    """Plan every combination, and check each as ``alignkit check`` does.

    A varied setting applies to the requested stage alone, so that its runs share the runs that they start from. Those
    of another stage, the model and the tuner also change these: such runs are trained once for each of their values.

    Args:
        file: the content of the config file.
        cli: flags and overrides, without the varied settings.
        settings: the grid of settings.
        output: the folder of the sweep.
        trusted: the file may name code to run (see :mod:`alignkit.config.trust`).

    Raises:
        AlignkitError: an error that would stop one of the runs.
    """
    registry = Registry()
    stage = requested_stage(registry, file, cli)
    stages = {each.name for each in registry.all("stage")}
    parents, jobs, names = dict[Path, Job](), list[Job](), list(settings.varied)
    _check_names(settings, stage, stages)
    for varied in settings.combinations():
        name = grid.folder_name(varied, names)
        with _named_error(name):
            shared = {key: value for key, value in varied.items() if _concerns_parents(key, stage, stages)}
            folder = output / grid.folder_name(shared, names) if shared else output
            own = [parse_override(f"{_of_stage(key, stage, stages)}={value}") for key, value in varied.items()]
            planned = pipeline(Registry(), file, merge(cli, {"output": str(folder)}, *own), trusted=trusted)
            if not planned.to_train:
                raise ConfigError(f"{planned.finished[0].folder} is a finished run. Choose another --output")
            *before, last = planned.to_train
            for each in before:
                parents.setdefault(each.config.folder, Job(str(each.config.folder), each.config, _needs(each)))
            job = Job(name, dataclasses.replace(last.config, output=str(output / name)), _needs(last), varied)
            _check_folder(job)
            jobs.append(job)
    return Sweep(output, stage, list(parents.values()), jobs)


def _check_names(settings: Grid, stage: str, stages: set[str]) -> None:
    """Check that no varied setting is given again under another name, such as ``ppo.train.seed`` for ``train.seed``."""
    fixed = [override.partition("=")[0].removeprefix("stages.") for override in settings.fixed]
    varied = [_of_stage(key, stage, stages).removeprefix("stages.") for key in settings.varied]
    for key, full in zip(settings.varied, varied, strict=True):
        if full in fixed or varied.count(full) > 1:
            raise ConfigError(f"{key} is given twice: it is also {full}")


@contextlib.contextmanager
def _named_error(name: str) -> Iterator[None]:
    try:
        yield
    except AlignkitError as error:
        error.args = (f"{name}: {error}",)
        raise


def _concerns_parents(key: str, stage: str, stages: set[str]) -> bool:
    """Whether a setting changes the runs that the requested stage starts from."""
    first = key.removeprefix("stages.").partition(".")[0]
    if first in ("output", "plugins"):
        raise ConfigError(f"{first} cannot have several values in a sweep")
    return first in OF_PARENTS or (first in stages and first != stage)


def _of_stage(key: str, stage: str, stages: set[str]) -> str:
    """A shared key as that of the requested stage alone: ``train.seed`` as ``stages.ppo.train.seed``."""
    first = key.partition(".")[0]
    return key if first in (*OF_PARENTS, "stages", *stages) else f"stages.{stage}.{key}"


def _needs(planned: Plan) -> list[Path]:
    return [parent.folder for parent in planned.parents.values() if parent.manifest is None]


def _check_folder(job: Job) -> None:
    if job.is_finished:
        return
    try:
        check_folder(job.config, resume=True, overwrite=False)
    except ConfigError as error:
        raise ConfigError(
            f"{job.folder} was trained with other settings. Choose another --output, or remove that folder. {error}"
        ) from None
