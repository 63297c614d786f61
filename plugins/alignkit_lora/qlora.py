"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen base in 4-bit NF4, LoRA adapters on top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit import Tuner, hookimpl, option
from alignkit_lora import lora

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QloraConfig(lora.LoraConfig):
    """The ``tuner`` table of ``qlora``."""

    double_quant: bool = option(True, "quantize the quantization constants too; saves 0.4 bits per weight")


def load(config: QloraConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: NF4 weights, computing in the run's dtype.

    The weights that stay unquantized (embeddings, norms, head) have ``config.dtype``.
    """
    from transformers import BitsAndBytesConfig

    return {
        **lora.load(config, dtype),
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        ),
    }


@hookimpl
def alignkit_model() -> list[Tuner]:
    return [
        Tuner(
            name="qlora",
            summary="train low-rank adapters on a frozen 4-bit base (NF4)",
            config=QloraConfig,
            load=load,
            wrap=lora.wrap,
            adapters=True,
            lr_scale=10,
            requires=("bitsandbytes",),
        )
    ]
