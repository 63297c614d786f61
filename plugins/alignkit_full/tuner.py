"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from alignkit import option

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FullConfig:
    """The ``tuner`` table of ``full``."""

    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "dtype of the trained weights; bfloat16 halves the memory, but loses updates below 1/256 of a weight",
    )


def load(config: FullConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: the weights' own dtype, whatever the run computes in."""
    return {"dtype": config.dtype}


def wrap(config: FullConfig, model: PreTrainedModel, role: str) -> PreTrainedModel:
    """The model as it is: all of it is trainable."""
    return model
