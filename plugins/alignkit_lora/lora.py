"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from alignkit import ConfigError, did_you_mean, option

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraConfig:
    """The ``tuner`` table of ``lora``, with PEFT's names. ``qlora`` extends it."""

    r: Annotated[int, Gt(0)] = option(16, "rank of the adapters")
    lora_alpha: Annotated[float, Gt(0)] = option(32, "the adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    target_modules: str | list[str] = option("all-linear", "the layers that get an adapter: names, or all-linear")
    use_dora: bool = option(False, "DoRA: train magnitude and direction separately (arXiv 2402.09353)")
    use_rslora: bool = option(False, "rank-stabilized LoRA: scale by lora_alpha / sqrt(r) (arXiv 2312.03732)")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the frozen base; null: that of training"
    )


def load(config: LoraConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: the dtype of the frozen base, if it is not the run's."""
    return {"dtype": config.dtype} if config.dtype else {}


def wrap(config: LoraConfig, model: PreTrainedModel, role: str) -> PeftModel:
    """Freeze the model and add a new adapter in fp32, which does not change the outputs at first.

    The head of a model for sequence classification is trained too, and saved with the adapter.

    Raises:
        ConfigError: no layer has the name of one of ``target_modules``.
    """
    import peft

    if isinstance(config.target_modules, list):
        layers = {name for name, module in model.named_modules() if hasattr(module, "weight")}
        _check_targets(config.target_modules, layers, hasattr(model, "score"))
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


def _check_targets(targets: list[str], layers: set[str], head: bool) -> None:
    for target in targets:
        if head and target in ("lm_head", "embed_out"):  # replaced by the scalar head
            continue
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            known = {layer.rpartition(".")[2] for layer in layers}
            hint = f".{hint}" if (hint := did_you_mean(target, known)) else ""
            raise ConfigError(f"tuner.target_modules: no layer is named '{target}'{hint}")
