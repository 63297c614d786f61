"""A tuner that trains only the last layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from alignkit import Tuner, hookimpl, option

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Config:
    """The ``tuner`` table."""

    layers: Annotated[int, Gt(0)] = option(2, "number of layers to train, counted from the last")


def load(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of ``from_pretrained``. Trained weights must be fp32, whatever dtype the run computes in."""
    return {"dtype": "float32"}


def wrap(config: Config, model: PreTrainedModel, role: str) -> PreTrainedModel:
    """Return the model, trainable in its last layers and in the scalar head of a reward or value model."""
    from torch import nn

    model.requires_grad_(False)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for trained in [*layers[-config.layers :], *([model.score] if hasattr(model, "score") else [])]:
        trained.requires_grad_(True)
    return model


@hookimpl
def alignkit_model() -> list[Tuner]:
    return [Tuner(name="my-thing", summary="train only the last layers", config=Config, load=load, wrap=wrap)]
