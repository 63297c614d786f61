"""Builds the optimizers of Transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignkit import ConfigError, NoConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainingArguments

Build = Callable[[NoConfig, "TrainingArguments"], tuple[type["Optimizer"], dict[str, Any]]]


def builder(optim: str, needs_cuda: bool = False) -> Build:
    """The ``build`` of the optimizer whose name in ``TrainingArguments.optim`` is ``optim``."""

    def build(config: NoConfig, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
        from transformers import Trainer

        if needs_cuda and args.device.type != "cuda":
            raise ConfigError(
                f"optimizer '{optim}' pages its states between GPU and CPU; this run is on {args.device.type}. "
                "Use optimizer.name=adamw_8bit or adamw"
            )
        args = copy.copy(args)
        args.optim = optim
        return Trainer.get_optimizer_cls_and_kwargs(args)

    return build
