"""IA3 (Liu et al. 2022, arXiv 2205.05638) with PEFT: trained vectors scale keys, values and feed-forward states.

A tuner is two functions: ``load`` decides how the base is loaded, ``wrap`` what is trained. Neither knows the stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit import Tuner, hookimpl, option

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ia3Config:
    """The ``tuner`` table of ``ia3``, with PEFT's names."""

    target_modules: list[str] | None = option(None, "layers to scale; null: PEFT's defaults for the architecture")
    feedforward_modules: list[str] | None = option(
        None, "layers that scale their input, not their output; null: PEFT's defaults"
    )


def load(config: Ia3Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of ``from_pretrained``: none, so the frozen base is loaded in the run's dtype."""
    return {}


def wrap(config: Ia3Config, model: PreTrainedModel, role: str) -> PeftModel:
    """Freeze the model and add scales of 1. A scalar head, if any, is trained and saved with them.

    Raises:
        ValueError: PEFT has no defaults for the architecture, and no layers are named.
    """
    import peft

    with_head = hasattr(model, "score")
    return peft.get_peft_model(
        model,
        peft.IA3Config(
            task_type="SEQ_CLS" if with_head else "CAUSAL_LM",
            modules_to_save=["score"] if with_head else None,
            target_modules=config.target_modules,
            feedforward_modules=config.feedforward_modules,
        ),
    )


@hookimpl
def alignkit_model() -> list[Tuner]:
    return [
        Tuner(
            name="ia3",
            summary="train scales of keys, values and feed-forward states on a frozen base",
            config=Ia3Config,
            load=load,
            wrap=wrap,
            adapters=True,
            lr_scale=100,  # a scale starts at 1: the paper's rate is 3e-3
        )
    ]
