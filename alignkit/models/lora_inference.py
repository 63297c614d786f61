"""LoRA layers without gradients: their adapter is cast to the compute dtype once, not at every call.

PEFT keeps adapters in fp32. In each forward pass it casts them or their input, scales the product and adds it: several
small operations in each layer. If the weights do not change meanwhile, one ``addmm`` gives the same to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignkit.models.peft_internals import plain_lora


class _Forward:
    """The forward of a LoRA layer with one plain adapter: ``base(x) + scaling * x A^T B^T``."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> None:
        self.base, self.down, self.up, self.scaling = base, down, up, scaling
        self.cast: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        if self.cast is None:  # now the compute dtype is known
            self.cast = self.down.to(result.dtype), (self.up * self.scaling).to(result.dtype).t()
        down, up = self.cast
        rows = functional.linear(x.to(result.dtype), down).flatten(0, -2)
        return torch.addmm(result.flatten(0, -2), rows, up).view(result.shape)


@contextlib.contextmanager
def lora_inference(model: Any) -> Iterator[None]:
    """Run the LoRA layers of ``model`` fast, with the adapter that is active now. Only for forwards without gradients.

    Parameters are not touched. Layers that are not plain LoRA, such as DoRA, run as they are.
    """
    adapters = {module: plain_lora(module) for module in model.modules()} if hasattr(model, "peft_config") else {}
    layers: dict[Any, str] = {layer: name for layer, name in adapters.items() if name is not None}
    for layer, name in layers.items():
        down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        layer.forward = _Forward(layer.base_layer, down, up, layer.scaling[name])
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
