"""A GPU made of main memory, for machines without one: tensors with data that claim to be on another device.

Each holds a CPU tensor, on which its operations run. As on CUDA, an operation on tensors of both devices raises; only
copies, numbers (CPU tensors without dimensions) and CPU indices are allowed. PyTorch takes it for an accelerator of a
third party, and so do accelerate and the Trainer. Autocast casts matrix products. The device cannot be removed again:
use it in a process of its own. ::

    python tests/fake_gpu.py < asked.json

runs ``commands`` of alignkit on this device and evaluates ``expressions``. Standard output gets, as JSON, the exit
status of each command, and all errors of devices, also those that were caught.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import training_args

NAME = "fakegpu"
AUTOCAST = torch._C.DispatchKey.AutocastPrivateUse1
aten = torch.ops.aten


class DevicesError(RuntimeError):
    """An operation has tensors on both devices."""

    raised: ClassVar[list[str]] = []  # also those that were caught

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.raised.append(message)


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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """It is saved as a CPU tensor."""
        return self.cpu_tensor.__reduce_ex__(protocol)

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


def register_autocast() -> list[torch.library.Library]:
    """Register autocast for matrix products. PyTorch has none for this device. It lasts as long as the result."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, AUTOCAST.name)
    products = torch.library.Library("aten", "IMPL")
    for name in ("linear", "matmul", "mm", "bmm", "addmm"):
        products.impl(name, functools.partial(in_autocast_dtype, getattr(aten, name)), AUTOCAST.name)
    return [others, products]


def in_autocast_dtype(product: Any, *args: Any, **kwargs: Any) -> Any:
    """A product of tensors that are cast from fp32."""
    dtype = torch.get_autocast_dtype(NAME)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(AUTOCAST)):
        cast = [a.to(dtype) if isinstance(a, torch.Tensor) and a.dtype is torch.float32 else a for a in args]
        return product(*cast, **kwargs)


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
    training_args.is_torch_bf16_gpu_available = lambda: True  # it knows the accelerators that Transformers supports
    autocast = register_autocast()
    with Operations():
        yield
    del autocast


def evaluate(expression: str) -> None:
    """Evaluate an expression with PyTorch's functions, in which ``gpu`` is this device."""
    with contextlib.suppress(DevicesError):
        eval(expression, {**vars(torch), "gpu": NAME})


def errors_of(function: Any, argument: Any) -> tuple[Any, list[str]]:
    """What a function returns, and the errors of devices meanwhile."""
    DevicesError.raised.clear()
    return function(argument), list(DevicesError.raised)


if __name__ == "__main__":
    from alignkit.cli import main
    from alignkit.runs import curves

    curves.can_draw = lambda: False  # drawing takes as long as training
    asked = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr), available():
        commands = [errors_of(main, command) for command in asked["commands"]]
        expressions = [errors_of(evaluate, expression) for expression in asked["expressions"]]
    print(json.dumps({"commands": commands, "expressions": expressions}))
