"""Runs PyTorch code on large tensors without data, so that a step of an 8B model takes seconds and no memory.

PyTorch's ``FakeTensor`` has a shape, a dtype and a storage of a size, but no data. Code that looks at data, such as a
loop until all answers have ended, cannot run on it. So here token ids, masks and all small tensors have data as usual,
and only large tensors of numbers with fractions, or of quantized ones, have none. An operation that makes a small
tensor or integers from them computes as if all elements of a large tensor were equal: 1, or what element-wise
operations made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alignkit.models.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    faked,
    is_alias,
    is_simple,
    keeps_shapes,
    makes_tensor,
    on_meta,
    places_written,
    reads_number,
    returns_nothing,
    storage_key,
    tree_leaves,
    tree_map,
)
from alignkit.planning.ledger import Ledger
from alignkit.planning.replaced import replaced

SMALL = 1 << 15  # elements of a tensor of numbers with fractions that has data
INTEGERS = 1 << 24  # of a tensor of integers or booleans that has data although it is computed from large tensors
VALUES = 1 << 22  # of a large tensor whose value is followed
CPU = torch.device("cpu")
aten = torch.ops.aten
PRODUCTS = (aten.bmm, aten.mm)  # of small tensors, as LoRA's, may be large
EMPTY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


class Phantoms(Ledger):  # type: ignore[no-untyped-call]
    """A :class:`Ledger` in whose context large tensors have no data."""

    def __init__(self, other: str = "activations") -> None:
        super().__init__(other)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation: on shapes alone if one of its tensors has no data."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        phantoms = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if phantoms:
            return self._on_phantoms(func, args, kwargs, phantoms)
        if not tensors or makes_tensor(func) or func.overloadpacket in PRODUCTS:  # of any size
            made = self._without_computing(func, args, kwargs)
            if isinstance(made, Tensor) and _is_large(made):
                return made
        result = func(*args, **kwargs)
        if func.overloadpacket in EMPTY:
            result.fill_(1)  # weights that are never read from a file; what was in memory might be NaN
        if isinstance(result, Tensor) and _is_large(result) and not is_alias(func, 0):
            return self.fake.from_tensor(result)
        return result

    def _on_phantoms(self, func: Any, args: Any, kwargs: Any, phantoms: Sequence[Tensor]) -> Any:
        if reads_number(func):
            return value_of(phantoms[0])
        if func is aten.equal.default:
            return value_of(args[0]) == value_of(args[1])
        if written := _written(func, args, kwargs):
            if not keeps_shapes(func):
                with self.fake:
                    func(*args, **kwargs)
            for place in written:
                if isinstance(place, Tensor) and not isinstance(place, FakeTensor) and _has_fractions(place):
                    place.fill_(value_of(phantoms[0]))  # it may have been uninitialized
            return None if returns_nothing(func) else written[0] if len(written) == 1 else tuple(written)
        args = _with_positions(func, args)
        try:
            result = self._without_computing(func, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._with_data(func, args, kwargs)
        if not isinstance(result, Tensor | tuple | list):
            return result
        return self._outputs(func, args, kwargs, result, value_of(phantoms[0]))

    def _without_computing(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation, without data."""
        if (is_simple(func) or makes_tensor(func)) and kwargs.get("device") in (None, CPU):
            return on_meta(self.fake, func, args, kwargs, CPU)
        if not is_alias(func, 0):
            args, kwargs = tree_map(self._faked, args), tree_map(self._faked, kwargs)
        with self.fake:
            return func(*args, **kwargs)

    def _faked(self, leaf: Any) -> Any:
        return faked(self.fake, leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf

    def _outputs(self, func: Any, args: Any, kwargs: Any, result: Any, value: float) -> Any:
        """The outputs of an operation, of which ``result`` has the shapes: integers and small tensors with data."""
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if all(is_alias(func, n) for n in range(len(outputs))):
            for output in outputs:
                set_value(output, value)
            return result
        if any(isinstance(o, Tensor) and not _has_fractions(o) and o.numel() <= INTEGERS for o in outputs):
            computed = self._with_data(func, args, kwargs)
            with_data = [computed] if isinstance(computed, Tensor) else list(computed)
        else:
            with_data = [None] * len(outputs)
        if any(isinstance(o, Tensor) and o.numel() <= VALUES for o in outputs) and torch.Tag.pointwise in func.tags:
            value = _of_one_element(func, args, kwargs)
        for n, (output, data) in enumerate(zip(outputs, with_data, strict=True)):
            if not isinstance(output, Tensor):
                continue
            if not _has_fractions(output):
                outputs[n] = output if data is None else data
            elif not _is_large(output):
                outputs[n] = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype).fill_(value)
            else:
                set_value(output, value)
        return outputs[0] if isinstance(result, Tensor) else type(result)(outputs)

    def _with_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation where phantoms have data, which takes no memory if they are large."""

        def data(leaf: Any) -> Any:
            if not isinstance(leaf, FakeTensor):
                return leaf
            filled = _filled(leaf).expand(leaf.shape)
            return filled.contiguous() if leaf.numel() <= VALUES else filled

        result = func(*tree_map(data, args), **tree_map(data, kwargs))
        return tree_map(self._without_data, result)

    def _without_data(self, leaf: Any) -> Any:
        return self.fake.from_tensor(leaf) if isinstance(leaf, Tensor) and _is_large(leaf) else leaf


def _is_large(tensor: Tensor) -> bool:
    return _has_fractions(tensor) and tensor.numel() > SMALL


class Copies(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            tensor, memo = args
            if id(tensor) not in memo:
                copy = tensor.detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
            return memo[id(tensor)]
        if func is Tensor.data_ptr and isinstance(args[0], FakeTensor):  # by which Transformers tells tensors apart
            return storage_key(args[0])
        return func(*args, **(kwargs or {}))


def moves() -> Any:
    """Let ``Module.to`` set the parameters of a module in this context. It would swap them, which these refuse."""
    return replaced(torch.utils, swap_tensors=_assign)


def _assign(parameter: Any, other: Any) -> None:
    parameter.data = other.data


def value_of(tensor: Tensor) -> Any:
    """The value that every element of a tensor without data counts as; the first element of one with data."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "_alignkit_value", 1)
    return tensor.flatten()[0].item() if tensor.numel() else 1


def set_value(tensor: Any, value: Any) -> None:
    if isinstance(tensor, FakeTensor):
        tensor._alignkit_value = value  # type: ignore[attr-defined]


def _filled(tensor: Tensor) -> Tensor:
    """A tensor without dimensions, of the dtype and with the value of ``tensor``."""
    return torch.full((), value_of(tensor), dtype=tensor.dtype)


def _of_one_element(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an element-wise operation on the values of its tensors."""
    one = func(*tree_map(_one, args), **tree_map(_one, kwargs))
    value = one.item() if isinstance(one, Tensor) else 1.0
    return value if math.isfinite(value) else 1.0


def _one(leaf: Any) -> Any:
    return _filled(leaf) if isinstance(leaf, Tensor) else leaf


def _has_fractions(tensor: Tensor) -> bool:
    """Whether it holds weights or activations: 8-bit integers are quantized ones."""
    return tensor.dtype.is_floating_point or (tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool)


def _with_positions(func: Any, args: Any) -> Any:
    """The arguments of an indexing operation with positions in place of masks, whose number of elements is known."""
    if func.overloadpacket not in (aten.index, aten.index_put):
        return args
    indices: list[Any] = []
    for index in args[1]:
        is_mask = isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        indices += index.nonzero().unbind(1) if is_mask else [index]
    return (args[0], indices, *args[2:])


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to and returns."""
    places = places_written(func)
    return [args[n] if n < len(args) else kwargs[name] for n, name in places if n < len(args) or name in kwargs]
