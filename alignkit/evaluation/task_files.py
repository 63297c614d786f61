"""Checks YAML files of lm-eval's tasks before lm-eval loads them. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError, did_you_mean, one_line


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's ``!function utils.score`` as None, without importing it."""


_Loader.add_constructor("!function", lambda loader, node: None)


def check(file: Path) -> None:
    """Check that lm-eval has the metrics that a file names.

    lm-eval would look for others on the Hugging Face hub, and run the code that it finds there.

    Raises:
        ConfigError: it does not have one, or the file cannot be read.
    """
    from lm_eval.api.registry import METRIC_REGISTRY

    content = read(file)
    tasks = content["task"] if isinstance(content.get("task"), list) else [content]
    for task in [task for task in tasks if isinstance(task, dict) and "process_results" not in task]:
        for entry in task.get("metric_list") or []:
            name = entry.get("metric")
            if isinstance(name, str) and entry.get("hf_evaluate") is not True and name not in METRIC_REGISTRY:
                raise ConfigError(
                    f"evaluate --tasks: {file}: lm-eval has no metric '{name}'.{did_you_mean(name, METRIC_REGISTRY)} "
                    "For a metric of Hugging Face Evaluate, which is downloaded, add 'hf_evaluate: true'"
                )


def group_of(file: Path) -> str | None:
    """The name of the group of tasks that a file declares; None if it declares a task."""
    name = read(file).get("group")
    return None if name is None else str(name)


def read(file: Path) -> dict[str, Any]:
    """The content of a file and of those that it includes; functions are None."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError:
        raise ConfigError(f"evaluate --tasks: no file {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluate --tasks: {file} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"evaluate --tasks: {file} does not declare a task")
    includes, merged = content.pop("include", []), dict[str, Any]()
    for included in [includes] if isinstance(includes, str) else includes:
        merged |= read(file.parent / included)
    return merged | content
