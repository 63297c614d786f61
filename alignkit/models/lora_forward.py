"""LoRA layers in few operations: ``base(x) + scaling * x A^T B^T``, with and without gradients.

PEFT keeps adapters in fp32. In each layer it casts the input and the adapter, scales the product and adds it: several
small operations that each write a tensor and, with gradients, save one. Here a layer adds its product in place, in the
dtype in which the base computes, and saves its input and the product with A. The results are the same to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignkit.errors import AlignkitError
from alignkit.models.device_and_dtype import compute_dtype
from alignkit.models.logit_form import base_of
from alignkit.models.peft_internals import plain_lora_layers


class _Forward:
    """The forward of a LoRA layer with one plain adapter. The adapter is cast once.

    ``down`` and ``up`` are its linear layers. Their weights are read in the forward pass, before which a sharded layer
    gathers them.
    """

    def __init__(self, base: nn.Module, down: Any, up: Any, scaling: float) -> None:
        self.base, self.down, self.up, self.scaling = base, down, up, scaling
        self.cast: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        down, up = self.down.weight, self.up.weight
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else result.dtype
        if self.cast is None:
            with torch.no_grad():
                self.cast = down.to(dtype), (up * self.scaling).to(dtype)
        # what bitsandbytes returns may be a view from inside of its autograd function, which must not change in place
        copy = torch.is_grad_enabled() and type(self.base) is not nn.Linear
        arguments = result.to(dtype, copy=copy).contiguous(), x.to(dtype), *self.cast
        if not torch.is_grad_enabled():
            return _add(*arguments)[0]
        added: Tensor = _AddLora.apply(*arguments, down, up, self.scaling)  # type: ignore[no-untyped-call]
        return added


def _add(result: Tensor, x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Add x A^T B^T to ``result`` [..., N] in place; also x A^T, [M, r]."""
    rows = x.flatten(0, -2) @ down.t()
    result.view(-1, result.shape[-1]).addmm_(rows, up.t())
    return result, rows


class _AddLora(torch.autograd.Function):
    """:func:`_add`, with gradients for ``x`` and for the adapter before it was cast and scaled, ``a`` and ``b``."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        result, rows = _add(result, x, down, up)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, rows, down, up)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, rows, down, up = ctx.saved_tensors
        of_result = gradient.flatten(0, -2)
        of_rows = of_result @ up  # [M, r], with the scaling
        needed, (of_x, of_a, of_b) = ctx.needs_input_grad, (None, None, None)
        if needed[1]:
            of_x = (of_rows @ down).view(x.shape)
        if needed[4]:
            of_a = (of_rows.t() @ x.flatten(0, -2)).to(ctx.dtypes[0])
        if needed[5]:
            of_b = (of_result.t() @ rows).to(ctx.dtypes[1]) * ctx.scaling
        return gradient, of_x, None, None, of_a, of_b, None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo may lose the attributes that are set here
@contextlib.contextmanager
def lora_forward(model: Any, prepared: dict[Any, Any] | None = None) -> Iterator[None]:
    """Run the LoRA layers of ``model`` in few operations, with the adapter that is active now.

    Its weights must not change meanwhile: they are cast at their first use. ``prepared`` keeps them cast for the next
    call with the same dictionary. Parameters are not touched. Layers that are not plain LoRA, such as DoRA, run as they
    are.
    """
    prepared = {} if prepared is None else prepared
    layers = plain_lora_layers(model)
    for layer, name in layers.items():
        if (layer, name) not in prepared:
            down, up = layer.lora_A[name], layer.lora_B[name]
            prepared[layer, name] = _Forward(layer.base_layer, down, up, layer.scaling[name])
        layer.forward = prepared[layer, name]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def merged_lora(model: Any) -> Iterator[None]:
    """Run the LoRA layers of ``model`` as one product each, with copies of their weights that the adapter is added to.

    For decoding, without gradients. The copies are in the dtype in which the layers compute: in bf16, what a small
    adapter adds may be lost to rounding. They take as much memory as the weights of these layers. The weights
    themselves are not touched.

    Raises:
        AlignkitError: no layer is plain LoRA on a linear layer that is not quantized.
    """
    dtype = compute_dtype(base_of(model))
    layers = {layer: name for layer, name in plain_lora_layers(model).items() if type(layer.base_layer) is nn.Linear}
    if not layers:
        raise AlignkitError(
            "merging LoRA needs LoRA layers on linear layers that are not quantized: set merge_lora=false"
        )
    with lora_forward(model), torch.no_grad():
        for layer, name in layers.items():
            base = layer.base_layer
            added = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
            bias = None if base.bias is None else base.bias.to(dtype)
            weight = (base.weight.float() + added).to(dtype)
            layer.forward = functools.partial(functional.linear, weight=weight, bias=bias)
        yield
