"""Uses of PEFT that are not its public API. ``tests/test_internals.py`` fails when a release changes it.

Everything here was checked with PEFT 0.21.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def belongs_to(adapter: str, parameter: str) -> bool:
    """Whether the parameter of that name belongs to that adapter.

    PEFT makes the adapter's name a part of the parameter's: ``...q_proj.lora_A.default.weight``.
    """
    return f".{adapter}." in f"{parameter}."


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is PEFT's and computes something else for each adapter.

    These are layers of tuners, modules that an adapter saves whole (``modules_to_save``) and trained tokens.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


@contextlib.contextmanager
def use_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Switch a PEFT model to one adapter, or with None to its base, and back. What is trainable does not change.

    PEFT's ``set_adapter`` and ``disable_adapter`` change ``requires_grad``, which is wrong where several adapters are
    trained. So this sets the two attributes that the forward of an adapted module reads.
    """
    layers = _adapted_modules(model)
    former = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, former, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def plain_lora(module: nn.Module) -> str | None:
    """The active adapter of a linear layer, if it is one adapter and its forward is ``base(x) + scaling * B(A(x))``.

    That is not so for DoRA and other variants, adapters with a bias, and dropout in training. None also for a base
    with hooks, which may keep its output and must not see it change.
    """
    from peft.tuners.lora import Linear, LoraLayer

    if not isinstance(module, LoraLayer) or "forward" in vars(module):  # such as one that accelerate has wrapped
        return None
    if type(module) is not Linear and type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
        return None
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    base = module.base_layer
    if base._forward_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    name: str = module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return None
    dropout = module.lora_dropout[name]
    return name if isinstance(dropout, nn.Identity) or not dropout.training else None


def plain_lora_layers(model: Any) -> dict[Any, str]:
    """The layers of a model that are :func:`plain_lora` now, each with its active adapter."""
    return {layer: name for layer in _adapted_modules(model) if (name := plain_lora(layer)) is not None}


def checkpoint_contexts(model: Any) -> tuple[Any, Any]:
    """``context_fn`` of ``torch.utils.checkpoint``: recompute with the adapter that is active now."""
    layers = _adapted_modules(model)
    if not layers:
        return contextlib.nullcontext(), contextlib.nullcontext()
    active = None if layers[0].disable_adapters else layers[0].active_adapters[0]
    return contextlib.nullcontext(), use_adapter(model, active)


def _adapted_modules(model: Any) -> list[Any]:
    """The adapted modules of a model, listed once: adapters that are added later are in the same modules."""
    if not hasattr(model, "peft_config"):
        return []
    layers = vars(model).get("_alignkit_layers")  # PEFT looks up other attributes on the model inside
    if layers is None:
        layers = [module for module in model.modules() if is_adapted(module)]
        object.__setattr__(model, "_alignkit_layers", layers)
    return list(layers)


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of a linear layer is quantized by bitsandbytes or HQQ, so that :func:`dense_weight` reads it.

    bitsandbytes' types of parameters are those that PEFT's ``dequantize_module_weight`` knows.
    """
    weight = module._parameters.get("weight")
    return type(weight).__name__ in ("Params4bit", "Int8Params") or hasattr(module, "W_q")


def layers_by_base(model: nn.Module) -> dict[nn.Module, list[Any]]:
    """The tuner layers of a PEFT model by the module of the base that they adapt."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[nn.Module, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layers.setdefault(module.get_base_layer(), []).append(module)
    return layers


def release_lora(layer: nn.Module) -> None:
    """Give back the memory of LoRA in a layer that is merged. Other adapters may share theirs with other layers."""
    from peft.tuners.lora import LoraLayer

    if isinstance(layer, LoraLayer):
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                parameter.data = parameter.data.new_empty(0)


def dense_weight(module: Any) -> Tensor:
    """The weight of a linear layer [out, in], dequantized to the dtype in which the layer computes with it."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module).detach()
    return weight.to(module.compute_dtype) if getattr(module, "compute_dtype", None) else weight
