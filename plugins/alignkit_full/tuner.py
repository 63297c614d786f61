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
    """Arguments of ``from_pretrained``: the dtype of the weights, which need not be that of the computation."""
    return {"dtype": config.dtype}


def wrap(config: FullConfig, model: PreTrainedModel, role: str) -> PreTrainedModel:
    """The model itself: all of its weights are trainable."""
    return model
