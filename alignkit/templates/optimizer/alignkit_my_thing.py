"""An optimizer: stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from alignkit import Optimizer, hookimpl, option

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Config:
    """The ``optimizer`` table."""

    momentum: Annotated[float, Ge(0)] = option(0.9, "momentum factor")
    nesterov: bool = option(False, "use Nesterov momentum")


def build(config: Config, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class and its arguments. The Trainer creates it, with one parameter group without weight decay."""
    import torch

    return torch.optim.SGD, {"lr": args.learning_rate, "momentum": config.momentum, "nesterov": config.nesterov}


@hookimpl
def alignkit_optimizer() -> list[Optimizer]:
    return [Optimizer(name="my-thing", summary="SGD with momentum", config=Config, build=build)]
