"""A plugin that gives models random weights, so that the memory of a model is measured without its files."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from alignkit import hookimpl


class RandomWeights:
    """Makes the model of a config where it would be loaded; 4-bit layers one at a time."""

    @hookimpl
    def alignkit_load_model(self, run: Any, role: str, name_or_path: str, kwargs: dict[str, Any]) -> Any:
        head = role in ("value", "reward")
        auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
        dtype = getattr(torch, kwargs["dtype"]) if isinstance(kwargs["dtype"], str) else kwargs["dtype"]
        config = transformers.AutoConfig.from_pretrained(name_or_path)
        config.num_labels, layers = 1, config.num_hidden_layers
        with torch.device(run.device):
            if "quantization_config" not in kwargs:
                return auto.from_config(config, dtype=dtype)
            config.num_hidden_layers = 1
            model: Any = auto.from_config(config, dtype=dtype)
            kind = type(model.model.layers[0])
            config.num_hidden_layers = layers
            model.model.layers = nn.ModuleList(quantized(kind(config, i).to(dtype)) for i in range(layers))
        model.config.num_hidden_layers = layers
        model.is_loaded_in_4bit = True  # where PEFT looks
        return model


def quantized(layer: nn.Module) -> nn.Module:
    """A layer with its linear layers in NF4."""
    import bitsandbytes as bnb

    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, child.weight.dtype, True, "nf4"
                )
                packed.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                if child.bias is not None:
                    packed.bias = child.bias
                setattr(module, name, packed.to(child.weight.device))
    return layer


random_weights = RandomWeights()
