"""Training and its plans in Python. No torch here until training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from alignkit.api import libraries, limits
from alignkit.api.runs import FinishedRun
from alignkit.api.settings import Data, FilePath, PluginLike, RewardFunction, arguments
from alignkit.components import Reward, Stage
from alignkit.errors import ConfigError
from alignkit.runs import plan_text
from alignkit.runs.plan import Pipeline, pipeline
from alignkit.runs.resume import check_folders

if TYPE_CHECKING:
    from alignkit.planning import Memory


@dataclass(frozen=True, repr=False)
class CheckedRuns(Pipeline):
    """The runs that a call would train (``to_train``), and the finished runs that it would use (``finished``)."""

    def __repr__(self) -> str:
        return "\n".join(plan_text.of_pipeline(self))


def train(
    stage: str | Stage | None = None,
    *,
    model: FilePath | None = None,
    data: Data | None = None,
    plugins: Iterable[PluginLike] = (),
    reward: str | Mapping[str, Any] | RewardFunction | Reward | None = None,
    output: FilePath | None = None,
    config: FilePath | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    **tables: Any,
) -> FinishedRun:
    """Train a stage, after the stages that it needs, as ``alignkit train`` does, and return its run.

    If a finished run with these settings exists, it is returned.

    Args:
        stage: the stage to train, such as ``"ppo"``. It may be left out if ``config`` names one.
        model: the base model: a hub id or a folder.
        data: the data of the stage: a path, a list of paths, a list of rows (dictionaries or rows of alignkit), or a
            ``data`` table with one of these as its ``path``. Rows are written to ``output``, so that the run can be
            resumed and reproduced.
        plugins: plugins to activate and use: names, components such as an :class:`alignkit.Loss`, hooks, and objects
            or modules with hooks.
        reward: the name of a reward, a ``reward`` table, an :class:`alignkit.Reward`, or a function of lists of prompts
            and answers that returns scores. The function also gets ``conversations``, the messages of the prompts, and
            ``fields``, the other fields of the rows, if it has these parameters.
        output: the output folder; each stage writes a subfolder, such as ``runs/sft``.
        config: a YAML config file. Arguments take precedence.
        resume: continue an unfinished run, or extend a finished one.
        overwrite: train the run again and replace the existing one.
        trust: let the config file, and the run that is resumed, name code to run and servers to use.
        tables: the other tables of a config file: ``train={...}``, ``tuner={...}``, ``ppo={...}``.

    Raises:
        AlignkitError: the errors of the command. Ctrl-C, or interrupting the kernel, finishes the step, writes a
            checkpoint, and raises one too; ``resume=True`` continues the run.
    """
    source = arguments(stage, model, data, plugins, reward, output, config, tables)
    planned = pipeline(*source, overwrite=overwrite, resume=resume, trusted=trust)
    check_folders(planned.to_train, resume, overwrite)
    if not planned.to_train:
        folder = planned.finished[-1].folder
        print(f"nothing to train: {folder} has these settings. To train it again, pass overwrite=True")
        return FinishedRun(folder)
    with libraries.prepared():
        from alignkit.training.execution import execute_all

        results = execute_all(planned.to_train, resume=resume, overwrite=overwrite, say=print)
    return FinishedRun(results[-1].folder)


def check(
    stage: str | Stage | None = None,
    *,
    model: FilePath | None = None,
    data: Data | None = None,
    plugins: Iterable[PluginLike] = (),
    reward: str | Mapping[str, Any] | RewardFunction | Reward | None = None,
    output: FilePath | None = None,
    config: FilePath | None = None,
    trust: bool = False,
    **tables: Any,
) -> CheckedRuns:
    """Check the arguments of :func:`train` and return the plan, which prints as ``alignkit check`` does.

    No model is loaded.

    Raises:
        AlignkitError: the errors of the command.
    """
    source = arguments(stage, model, data, plugins, reward, output, config, tables)
    planned = pipeline(*source, trusted=trust)
    check_folders(planned.to_train, resume=False, overwrite=False, plan_only=True)
    return CheckedRuns(planned.to_train, planned.finished)


def plan(
    stage: str | Stage | None = None,
    *,
    model: FilePath | None = None,
    data: Data | None = None,
    plugins: Iterable[PluginLike] = (),
    reward: str | Mapping[str, Any] | RewardFunction | Reward | None = None,
    output: FilePath | None = None,
    config: FilePath | None = None,
    trust: bool = False,
    device: Literal["cuda", "cpu"] | None = None,
    processes: int = 1,
    **tables: Any,
) -> Memory:
    """Estimate the memory that :func:`train` would take with these arguments, as ``alignkit plan`` does.

    No weights are loaded. ``device`` is the kind of device to plan for; None: where the run would train. The memory is
    that of each of so many ``processes``.

    Returns:
        ``peak`` and ``overhead`` in bytes, and ``phases``: phase -> part -> bytes. They are those of the stage, not of
        earlier stages that it needs.

    Raises:
        AlignkitError: the errors of the command.
    """
    if device not in ("cuda", "cpu", None):
        raise ConfigError(f"device must be 'cuda' or 'cpu' (got {device!r})")
    limits.check_whole(processes=processes)
    source = arguments(stage, model, data, plugins, reward, output, config, tables)
    planned = pipeline(*source, overwrite=True, trusted=trust)
    with libraries.prepared():
        from alignkit import planning

        return planning.memory(planned.to_train[-1], device, processes=processes)
