"""Checks a run whose rows are read while it trains (``data.streaming``), and opens its stream."""

from __future__ import annotations

from alignkit.config.resolve import RunConfig
from alignkit.data.streaming import RowStream
from alignkit.errors import ConfigError
from alignkit.registry import Registry


def stream(registry: Registry, config: RunConfig) -> RowStream:
    """The stream of a run.

    Raises:
        ConfigError: the stage cannot train on a stream, or a setting of ``train`` needs the number of rows.
        DataError: from :class:`alignkit.data.streaming.RowStream`.
    """
    stage, train = config.stage.component, config.train
    if not stage.streams:
        raise ConfigError(f"stage '{stage.name}' cannot train on a stream of rows. Set data.streaming=false")
    if train.get("max_steps", -1) < 1:
        raise ConfigError("data.streaming needs train.max_steps, since the number of rows is not known")
    if train.get("dataloader_num_workers"):
        raise ConfigError("train.dataloader_num_workers has no effect with data.streaming. Remove it")
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if train.get(key) == "epoch":
            raise ConfigError(f"train.{key}=epoch: with data.streaming, the end of an epoch is not known. Set steps")
    strategy = train.get("train_sampling_strategy", "random")
    if strategy != "random":
        raise ConfigError(f"train.train_sampling_strategy={strategy} has no effect with data.streaming. Remove it")
    return RowStream(registry, config.data, stage.rows)
