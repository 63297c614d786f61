"""Models whose weights are spread over processes by FSDP2, PyTorch's ``fully_shard``.

Outside of forward and backward passes each process holds its part of every weight, a ``DTensor``. A forward pass of the
whole module gathers one layer after another. Everything here is a collective operation: every process must call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignkit.models.layers import decoder_layers
from alignkit.models.peft_internals import belongs_to
from alignkit.models.torch_internals import start_fsdp


def shard(module: nn.Module, models: Sequence[Any], device: torch.device, processes: int) -> None:
    """Spread the weights of ``module`` over all processes, in place.

    Each decoder layer of its language ``models`` is a group of weights that are gathered together. All other weights,
    such as embeddings and heads, are one more group, which the forward pass of ``module`` gathers.
    """
    for each in module.modules():
        _store_4bit_as_floats(each)
    mesh = init_device_mesh(device.type, (processes,))
    for model in models:
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    start_fsdp(module)
    for each in module.modules():
        each.register_load_state_dict_pre_hook(_distribute)  # type: ignore[no-untyped-call]


def is_4bit(parameter: Tensor) -> bool:
    """Whether a parameter is a weight in 4 bits by bitsandbytes."""
    return type(parameter).__name__ == "Params4bit"


def _store_4bit_as_floats(module: Any) -> None:
    """Let the bytes of a 4-bit weight be stored as bf16, as ``bnb_4bit_quant_storage`` does.

    Older versions of ``fully_shard`` take floating-point weights only. The bytes stay the same.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is not None and is_4bit(weight) and not weight.is_floating_point():
        weight.data = weight.data.flatten().view(torch.bfloat16).view(-1, 1)
        module.quant_storage = torch.bfloat16  # bitsandbytes reads it when the weight is gathered


def _distribute(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let ``load_state_dict`` take whole weights."""
    for name, parameter in module.named_parameters(recurse=False):
        if (key := f"{prefix}{name}") in state_dict:
            state_dict[key] = shard_like(parameter, state_dict[key])


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was called on a module, or on one that contains its layers."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def held_bytes(module: nn.Module) -> tuple[int, int]:
    """The bytes of the weights that this process holds, and those of whole weights."""
    parameters = list(module.parameters())
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(p.numel() * p.element_size() for p in parts), sum(p.numel() * p.element_size() for p in parameters)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, which every process has whole or in parts, spread over processes as ``parameter`` is."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextlib.contextmanager
def gathered(module: nn.Module, model: Any) -> Iterator[None]:
    """Hold all weights of ``model`` on every process, to sample from it. It is sharded as a part of ``module``.

    It can then be called by itself, and processes may call it a different number of times. No weight may change, and
    there are no gradients. Nothing happens to a module that is not sharded.
    """
    groups = [each for each in dict.fromkeys([module, *model.modules()]) if isinstance(each, FSDPModule)]
    with torch.no_grad():
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
        try:
            yield
        finally:
            for group in groups:
                group.set_reshard_after_forward(True, recurse=False)
                group.reshard()


@contextlib.contextmanager
def whole_weights(module: nn.Module, models: Sequence[Any], keep: bool) -> Iterator[None]:
    """Replace the weights of ``module`` that are saved by whole ones, on the CPU of the processes that ``keep`` them.

    These are all weights of those of its language ``models`` that are trained. Of the layers of PEFT models, they are
    those of adapters.
    """
    saved = {id(p) for p in module.parameters() if p.requires_grad}
    for model in models:
        if any(p.requires_grad for p in model.parameters()):
            adapters = getattr(model, "peft_config", ())
            of_layers = decoder_layers(model).named_parameters() if adapters else ()
            frozen = {id(p) for n, p in of_layers if not any(belongs_to(adapter, n) for adapter in adapters)}
            saved |= {id(p) for p in model.parameters()} - frozen
    of_parameter: dict[int, nn.Parameter] = {}  # tied weights stay tied
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if id(parameter) in saved:
                saved.remove(id(parameter))  # every process gathers it once
                tensor = full_tensor(parameter.detach())
                if keep:
                    of_parameter[id(parameter)] = nn.Parameter(tensor.cpu(), parameter.requires_grad)
            if id(parameter) in of_parameter:
                replaced.append((each, name, parameter))
    try:
        for each, name, parameter in replaced:
            setattr(each, name, of_parameter[id(parameter)])
        yield
    finally:
        for each, name, parameter in replaced:
            setattr(each, name, parameter)
