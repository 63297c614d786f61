"""``transformers.TrainingArguments`` from the ``train`` table, with the checks that need the libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignkit.config.training_args import OWN
from alignkit.errors import ConfigError, one_line
from alignkit.runs.better import direction

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    Args = TypeVar("Args", bound=TrainingArguments)


def build(
    cls: type[Args],
    train: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    **own: Any,
) -> Args:
    """``cls`` from the ``train`` table and ``own``, which wins. Other arguments have the defaults of Transformers.

    Raises:
        ConfigError: the libraries reject a value.
    """
    import torch
    from transformers import TrainingArguments

    defaults = {f.name: f for f in dataclasses.fields(cls)}
    values = {
        f.name: f.default
        for f in dataclasses.fields(TrainingArguments)
        if f.init and f.default is not dataclasses.MISSING and f.default != defaults[f.name].default
    }
    values |= {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}
    values |= {"use_cpu": device.type == "cpu", "dataloader_pin_memory": device.type == "cuda"}
    try:
        report_to = train.get("report_to") or "none"
        of_run = {"output_dir": str(folder), "disable_tqdm": True, "report_to": report_to}
        theirs = {name: value for name, value in train.items() if name not in OWN}
        args = cls(**{**values, **_best(theirs), **theirs, **of_run, **own})
        if "kubeflow" not in report_to:  # a variable of the environment adds it
            args.report_to = [name for name in args.report_to if name != "kubeflow"]
        _check(args)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"train: {one_line(error)}") from error
    return args


def _best(train: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a higher value of the metric for the best model is better. Transformers takes all but losses for that."""
    metric = train.get("metric_for_best_model")
    if metric is None or train.get("greater_is_better") is not None:
        return {}
    if sign := direction(metric.removeprefix("eval_")):
        return {"greater_is_better": sign > 0}
    raise ConfigError(
        f"train.metric_for_best_model={metric} needs train.greater_is_better: true if a higher value is better, "
        "false if a lower one is"
    )


def _check(args: TrainingArguments) -> None:
    """Create what the Trainer would create only after the model is loaded, or after the first steps."""
    import torch
    from accelerate.utils import DynamoBackend  # type: ignore[import-untyped]
    from transformers import get_scheduler

    from alignkit.models import transformers_internals

    if args.torch_compile:
        DynamoBackend(str(args.torch_compile_backend).upper())
    transformers_internals.check_report_to(args)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    kwargs = args.lr_scheduler_kwargs
    get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, dict(kwargs) if isinstance(kwargs, dict) else None)
