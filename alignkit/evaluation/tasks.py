"""Tasks of lm-eval, EleutherAI's evaluation harness, on a model in memory. No torch at the top."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from alignkit import paths
from alignkit.errors import AlignkitError, ConfigError, one_line
from alignkit.evaluation import task_files, task_metrics
from alignkit.evaluation.task_metrics import TaskMetric

if TYPE_CHECKING:
    from alignkit.generation.chat import LoadedModel

FILES = (".yaml", ".yml")
FEWSHOT_SEED, SEED = 1234, 1234  # lm-eval's own


@dataclass(frozen=True)
class TaskSettings:
    """Settings for the evaluation of tasks; the names are lm-eval's."""

    limit: float | None = None  # documents of each task; below 1, a share of them; None: all
    num_fewshot: int | None = None  # None: as the task says
    apply_chat_template: bool = False
    batch_size: int = 8


# --- loading ---------------------------------------------------------------------------------------------------------


def load(names: Sequence[str]) -> Any:
    """lm-eval's tasks and groups with these names, or in these YAML files; a name may be a pattern such as ``mmlu_*``.

    Nothing is sent, and nothing is downloaded but what a task names: its data, and metrics with ``hf_evaluate: true``.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.
        AlignkitError: a task cannot be loaded, such as without the hub.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate --tasks needs lm-eval, which is not installed: pip install 'alignkit[lm-eval]'")
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # loading a local file would be counted on a server
    logging.getLogger("lm_eval").setLevel(logging.WARNING if os.environ.get("ALIGNKIT_DEBUG") else logging.CRITICAL)
    files = {name: paths.expand(name) for name in names if name.endswith(FILES)}
    for file in files.values():
        task_files.check(file)
    groups = {name: group for name, file in files.items() if (group := task_files.group_of(file))}
    manager = TaskManager(
        include_path=[files[name].absolute().parent for name in groups],  # of their tasks
        include_defaults=bool(groups) or len(files) < len(names),
    )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        for found in [groups.get(name, str(files[name]))] if name in files else _matches(manager, name):
            try:
                with _quiet():
                    part = manager.load(found)
            except Exception as error:  # of a file, of a task's Python code, or of the hub
                raise AlignkitError(f"evaluate --tasks: lm-eval cannot load {found}: {one_line(error)}") from error
            if twice := part["tasks"].keys() & loaded["tasks"].keys():
                raise ConfigError(f"evaluate --tasks: {min(twice)} is named twice, by {name} and another name")
            for kind in loaded:
                loaded[kind] |= part[kind]
    _check_safe(loaded["tasks"])
    return loaded


def _matches(manager: Any, name: str) -> list[str]:
    if found := manager.match_tasks([name]):
        return list(found)
    close = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f" Close matches: {', '.join(close)}" if close else " `lm-eval ls tasks` lists them"
    raise ConfigError(f"evaluate --tasks: lm-eval has no task '{name}'.{hint}")


def _check_safe(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"evaluate --tasks: {name} runs code that the model writes. Use lm-eval itself in a sandbox"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"evaluate --tasks: {name} needs more than text, and runs are language models")


# --- evaluation ------------------------------------------------------------------------------------------------------


def measure(model: LoadedModel, tasks: Any, settings: TaskSettings, warn: Callable[[str], None]) -> list[TaskMetric]:
    """The metrics of a model on tasks of :func:`load`. ``warn`` prints a warning for the user.

    Raises:
        AlignkitError: lm-eval could not evaluate the model.
    """
    import lm_eval
    import numpy as np
    import torch
    from lm_eval.models.huggingface import HFLM

    model.model.generation_config.eos_token_id = model.stop_ids  # that of an adapter's base lacks the end of a turn
    harness = HFLM(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        batch_size=settings.batch_size,
        softmax_dtype=torch.float32,  # in bf16, the log-probabilities of different answers are rounded to the same
    )
    for task in tasks["tasks"].values():  # as lm_eval.simple_evaluate does
        of_task = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and of_task != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif of_task is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        with _counted_truncations(warn, harness.max_length), _quiet():
            results = lm_eval.evaluate(
                lm=harness,
                task_dict=tasks,
                limit=settings.limit,
                bootstrap_iters=0,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
            )
    except AlignkitError:
        raise
    except Exception as error:
        raise AlignkitError(f"evaluate --tasks: lm-eval failed: {one_line(error)}") from error
    return task_metrics.of_results(tasks, results)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress bars only on a terminal, and nothing of it on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        if sys.stderr.isatty() or os.environ.get("ALIGNKIT_DEBUG"):
            yield
        else:
            with contextlib.redirect_stderr(io.StringIO()):
                yield


@contextlib.contextmanager
def _counted_truncations(warn: Callable[[str], None], length: int) -> Iterator[None]:
    """lm-eval cuts prompts that are too long for the model, and logs a warning for each."""
    logger, count = logging.getLogger("lm_eval.models.huggingface"), 0

    def cut(record: logging.LogRecord) -> bool:
        nonlocal count
        count += "runcat" in record.getMessage()
        return bool(os.environ.get("ALIGNKIT_DEBUG"))

    logger.addFilter(cut)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeFilter(cut)
        logger.setLevel(level)
    if count:
        warn(f"warning: lm-eval cut {count} prompts, which are longer than the model's {length} tokens, from the left")
