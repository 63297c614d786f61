"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from alignkit import option

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraConfig:
    """The ``tuner`` table of ``lora``, by PEFT's names; ``qlora`` adds to it."""

    r: Annotated[int, Gt(0)] = option(16, "rank of the adapters")
    lora_alpha: float = option(32, "the adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    target_modules: str | list[str] = option("all-linear", "which layers get an adapter; names, or all-linear")
    use_dora: bool = option(False, "DoRA: train magnitudes beside directions (arXiv 2402.09353)")
    use_rslora: bool = option(False, "rank-stabilised: scale by lora_alpha / sqrt(r) (arXiv 2312.03732)")


def load(config: LoraConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: none, the frozen base is loaded in the run's dtype."""
    return {}


def wrap(config: LoraConfig, model: PreTrainedModel, role: str) -> PeftModel:
    """The model frozen, with a fresh adapter whose weights are fp32. At first it computes what the base computes.

    A model for sequence classification trains its head too, and the head is saved with the adapter.
    """
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
            modules_to_save=["score"] if hasattr(model, "score") else None,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        ),
    )
