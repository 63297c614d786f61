"""Compute in fp32 with the weights of a model as they are stored, in 16 or 4 bits, one layer at a time.

So two models can be compared without the rounding of their computation, and without a copy of them in fp32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignkit.models.peft_internals import dense_weight, is_quantized

ROWS = 8192  # of a weight that are converted at a time: a head has one for each token of the vocabulary


@contextlib.contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Have the forward of ``model`` compute in fp32, without gradients. The weights themselves are not changed."""
    with contextlib.ExitStack() as stack:
        for module in list(model.modules()):
            if is_quantized(module) or (type(module) is nn.Linear and _in_few_bits(module.weight)):
                module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]
                stack.callback(delattr, module, "forward")
            elif type(module) is nn.Embedding and _in_few_bits(module.weight):
                stack.callback(module.register_forward_hook(lambda _, inputs, rows: rows.float()).remove)
            elif any(map(_in_few_bits, module.parameters(recurse=False))):
                stored = _Stored()
                stack.callback(module.register_forward_pre_hook(stored.convert).remove)
                stack.callback(module.register_forward_hook(stored.restore, always_call=True).remove)
        stack.enter_context(torch.no_grad())
        yield


def _linear(module: Any, x: Tensor) -> Tensor:
    x, bias = x.float(), None if module.bias is None else module.bias.float()
    parts = [functional.linear(x, rows.float()) for rows in torch.split(dense_weight(module), ROWS)]
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return outputs if bias is None else outputs + bias


class _Stored:
    """The parameters of a module, kept while its forward computes with copies of them in fp32."""

    def convert(self, module: nn.Module, inputs: Any) -> None:
        self.parameters = {name: p for name, p in module.named_parameters(recurse=False) if _in_few_bits(p)}
        for name, parameter in self.parameters.items():
            setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))

    def restore(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        for name, parameter in self.parameters.items():
            setattr(module, name, parameter)


def _in_few_bits(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)
