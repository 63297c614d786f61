"""Weights that DeepSpeed's ZeRO-3 has partitioned: each process holds a part, and the parameter itself is empty."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def whole_weights_of(module: nn.Module) -> Iterator[None]:
    """Hold the whole weights of ``module`` on every process. Those of the first process are kept afterwards.

    Every process must enter it. Nothing happens to a module that is not partitioned.
    """
    partitioned = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def held(parameter: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part
