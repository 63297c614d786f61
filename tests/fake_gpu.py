"""A GPU made of main memory, for machines without one: tensors with data that claim to be on another device.

Each holds a CPU tensor, on which its operations run. As on CUDA, an operation on tensors of both devices raises; only
copies, numbers (CPU tensors without dimensions) and CPU indices are allowed. PyTorch takes it for an accelerator of a
third party, and so do accelerate and the Trainer. It cannot be removed again, so it needs a process of its own::

    python tests/fake_gpu.py < asked.json

runs ``commands`` of alignkit on this device, evaluates ``expressions``, and writes the exit statuses and which
expressions raised to standard output as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
aten = torch.ops.aten


class DevicesError(RuntimeError):
    """An operation has tensors on both devices."""


class GPUTensor(torch.Tensor):
    """A tensor on the device; ``cpu_tensor`` has its data."""

    cpu_tensor: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> GPUTensor:
        layout = (data.shape, data.stride(), data.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=data.dtype, device=torch.device(NAME, 0))
        made.cpu_tensor = data
        return made

    def tolist(self) -> Any:
        """PyTorch refuses this for subclasses."""
        return self.cpu_tensor.tolist()

    def untyped_storage(self) -> Any:
        """Libraries compare storages to find shared weights."""
        return self.cpu_tensor.untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:
        return f"{NAME}:{self.cpu_tensor!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Operations(TorchDispatchMode):
    """Handles operations that have no tensors too, such as ``torch.zeros``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the data of its tensors. Its results are on the device where CUDA's would be.

    Raises:
        DevicesError: it has tensors on both devices.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GPUTensor)]
    if on_gpu:
        check_devices(func, args, kwargs)
    if func.overloadpacket is aten.copy_:
        to_gpu = isinstance(args[0], GPUTensor)
    elif device := kwargs.get("device"):
        to_gpu = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu") if to_gpu else device}
    else:
        to_gpu = bool(on_gpu)
    of_data = {id(tensor.cpu_tensor): tensor for tensor in on_gpu}  # an operation in place returns its argument

    def to_cpu(leaf: Any) -> Any:
        return leaf.cpu_tensor if isinstance(leaf, GPUTensor) else leaf

    def from_cpu(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return of_data[id(leaf)] if id(leaf) in of_data else GPUTensor(leaf)

    result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
    return tree_map(from_cpu, result) if to_gpu else result


def check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Check that an operation on the device has no CPU tensors where CUDA does not allow them.

    Raises:
        DevicesError: it has.
    """
    kind = func.overloadpacket
    if kind in (aten._to_copy, aten.copy_):
        return
    if kind in (aten.index, aten.index_put_, aten.index_put) and isinstance(args[0], GPUTensor):
        args = (args[0], *args[2:])  # indices may be on the CPU
    numbers = torch.Tag.pointwise in func.tags or func.__name__.startswith(("_foreach", "_fused", "index_put"))
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, GPUTensor) and (leaf.dim() or not numbers):
            raise DevicesError(f"{func} has tensors on both devices: one of shape {tuple(leaf.shape)} is on the CPU")


class Module(backend_registration._DummyBackendModule):
    """``torch.fakegpu``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@contextlib.contextmanager
def available() -> Iterator[None]:
    """Make the device the accelerator of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.to` cannot change the class of a parameter in place
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) makes a CPU tensor and moves it
    with Operations():
        yield


def raises(expression: str) -> bool:
    """Whether an expression with PyTorch's functions has tensors on both devices; ``gpu`` is this one."""
    try:
        eval(expression, {**vars(torch), "gpu": NAME})
    except DevicesError:
        return True
    return False


if __name__ == "__main__":
    from alignkit.cli import main

    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr), available():
        statuses = [main(command) for command in asked["commands"]]
        raised = [raises(expression) for expression in asked["expressions"]]
    print(json.dumps({"statuses": statuses, "raised": raised}))
