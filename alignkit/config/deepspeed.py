"""The DeepSpeed configuration of a run, ``train.deepspeed``. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit import paths, yaml
from alignkit.errors import ConfigError, did_you_mean

# sections that change neither the loss, nor the optimizer, nor the data
SECTIONS = (
    *("zero_optimization", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "communication_data_type", "zero_allow_untested_optimizer"),
    *("wall_clock_breakdown", "comms_logger", "steps_per_print", "memory_breakdown", "aio"),
)
SET_ELSEWHERE = {
    "optimizer": "set optimizer.name",
    "scheduler": "set train.lr_scheduler_type",
    "activation_checkpointing": "set train.gradient_checkpointing",
}
FORMATS = {"bf16": "train.bf16", "fp16": "train.bf16"}


def read(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The table of ``train.deepspeed``: ``value`` itself, or the content of the JSON file that it names.

    Mixed precision is left out: the dtypes of alignkit's runs do not depend on the engine.

    Raises:
        ConfigError: there is no such file, it cannot be read, or its settings contradict those of alignkit.
    """
    table = _content(value) if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise ConfigError(f"train.deepspeed: {value} is not a table of settings, such as {{zero_optimization: ...}}")
    table = dict(table)
    for name, instead in FORMATS.items():
        if _enabled(table.pop(name, None)) is True:
            raise ConfigError(f"train.deepspeed.{name} is not supported: set {instead}")
    for name in table:
        if name in SET_ELSEWHERE:
            raise ConfigError(f"train.deepspeed.{name} is not supported: {SET_ELSEWHERE[name]}")
        if name not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise ConfigError(
                f"train.deepspeed.{name} is not supported.{did_you_mean(name, SECTIONS)} Sections: {known}"
            )
    zero = table.get("zero_optimization")
    if not isinstance(zero, Mapping) or zero.get("stage") not in (2, 3):
        raise ConfigError("train.deepspeed.zero_optimization.stage must be 2 or 3")
    if zero["stage"] == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is False:
        raise ConfigError(
            "train.deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save=false: the run would be saved "
            "without its weights. Remove it"
        )
    return table


def _content(path: str) -> Any:
    try:
        return yaml.load(paths.expand(path))  # JSON is YAML
    except ConfigError as error:
        raise ConfigError(f"train.deepspeed: {error}") from None


def _enabled(section: Any) -> Any:
    return section.get("enabled") if isinstance(section, Mapping) else section


def check(train: Mapping[str, Any]) -> None:
    """Check that a ``train`` table with ``deepspeed`` can be trained here.

    Raises:
        ConfigError: DeepSpeed is not installed, or another setting excludes it.
    """
    if not train.get("deepspeed"):
        return
    if train.get("shard"):
        raise ConfigError("train.deepspeed and train.shard are both set. Set only one of them")
    if train.get("fp16"):
        raise ConfigError("train.fp16 does not work with train.deepspeed: set train.bf16=true, or train.fp16=false")
    if train.get("torch_compile"):
        raise ConfigError("train.torch_compile does not work with train.deepspeed. Set only one of them")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("train.deepspeed: DeepSpeed is not installed: pip install deepspeed")


def check_launch(tables: Sequence[Mapping[str, Any]]) -> None:
    """Check that the ``train`` tables of the runs of a command, and how its processes were launched, fit together.

    Raises:
        ConfigError: only part of the runs use DeepSpeed; ``accelerate launch`` shards weights in its own way.
    """
    used = {bool(train.get("deepspeed")) for train in tables}
    if len(used) > 1:
        raise ConfigError(
            "a command trains all its stages with train.deepspeed or none. Train the earlier stages with a command of "
            "their own"
        )
    for name in ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"accelerate launch is configured for {name}, which alignkit does not use. Set train.shard=fsdp2, and "
                "launch with alignkit launch --processes N -- train ..."
            )
    if _is_set("ACCELERATE_USE_DEEPSPEED") and used != {True}:
        raise ConfigError(
            "accelerate is configured for DeepSpeed in this process. Set train.deepspeed to its config file, and "
            "launch with alignkit launch --processes N -- train ..."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t")
