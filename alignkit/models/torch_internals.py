"""Uses of PyTorch that are private to it, or not in its documentation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "faked",
    "has_forward_hooks",
    "is_alias",
    "is_simple",
    "keeps_shapes",
    "makes_tensor",
    "on_meta",
    "places_written",
    "reads_number",
    "returns_nothing",
    "start_fsdp",
    "storage_key",
    "tree_leaves",
    "tree_map",
]

aten = torch.ops.aten
MAKERS = {
    *(aten.empty, aten.empty_strided, aten.full, aten.ones, aten.zeros),
    *(aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones, aten.new_zeros),
}
COPIES = {
    *(aten._to_copy, aten._unsafe_view, aten.clone),
    *(aten.empty_like, aten.full_like, aten.ones_like, aten.zeros_like),
}


def storage_key(tensor: torch.Tensor) -> int:
    """A number that tensors with the same storage share, while it exists. Storages without data have one too."""
    return tensor.untyped_storage()._cdata


def reads_number(func: Any) -> bool:
    """Whether an operation is that of ``Tensor.item``."""
    return func is aten._local_scalar_dense.default


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether functions are called before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def start_fsdp(root: Any) -> None:
    """Make an FSDP module the root of those in it, as its first forward pass would.

    Otherwise a layer that is called before becomes a root of its own, and the root can no longer be called.
    """
    root._get_fsdp_state()._lazy_init()


@functools.cache
def is_alias(func: Any, output: int) -> bool:
    """Whether an output of an operation is a view of an input."""
    returns = func._schema.returns
    return bool(returns) and returns[min(output, len(returns) - 1)].alias_info is not None


@functools.cache
def makes_tensor(func: Any) -> bool:
    """Whether an operation makes a tensor of a shape, with one value or none in particular."""
    return func.overloadpacket in MAKERS


@functools.cache
def is_simple(func: Any) -> bool:
    """Whether an operation returns a view or a copy of its only tensor, or a new tensor of that shape."""
    is_view = is_alias(func, 0) and not places_written(func)
    tensors = [each for each in func._schema.arguments if "Tensor" in str(each.type)]
    returns = [str(each.type) for each in func._schema.returns]
    return len(tensors) == 1 and returns == ["Tensor"] and (is_view or func.overloadpacket in COPIES)


def on_meta(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any, device: torch.device) -> FakeTensor:
    """The tensor without data that a simple operation, or one that makes a tensor, returns on ``device``.

    The operation would return the same in the context of ``mode``, but that takes several times as long.
    """
    if "device" in kwargs or makes_tensor(func):
        kwargs = {**kwargs, "device": torch.device("meta")}
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    return FakeTensor(mode, result, device)


def faked(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """A tensor without data of the shape, strides and dtype of a tensor, to compute the shapes of outputs."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, meta, tensor.device)


def returns_nothing(func: Any) -> bool:
    """Whether an operation has no outputs: it writes to its arguments."""
    return not func._schema.returns


@functools.cache
def places_written(func: Any) -> tuple[tuple[int, str], ...]:
    """The positions and names of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((n, each.name) for n, each in arguments if each.alias_info is not None and each.alias_info.is_write)


@functools.cache
def keeps_shapes(func: Any) -> bool:
    """Whether an operation that writes to its arguments changes no shape: not an argument ``out``, no ``resize_``."""
    is_out = any(each.kwarg_only and each.alias_info is not None for each in func._schema.arguments)
    return not is_out and torch.Tag.inplace_view not in func.tags
