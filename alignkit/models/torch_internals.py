"""What is private to PyTorch, or not in its documentation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "has_forward_hooks",
    "is_alias",
    "keeps_shapes",
    "places_written",
    "reads_number",
    "returns_nothing",
    "start_fsdp",
    "storage_key",
    "tree_leaves",
    "tree_map",
]


def storage_key(tensor: torch.Tensor) -> int:
    """A number that tensors with the same storage share, while it exists. Storages without data have one too."""
    return tensor.untyped_storage()._cdata


def reads_number(func: Any) -> bool:
    """Whether an operation is that of ``Tensor.item``."""
    return func is torch.ops.aten._local_scalar_dense.default


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
