"""FLOPs that a process computes, and the rate at which it multiplies matrices.

Torch's ``FlopCounterMode`` sees every operation and adds up matrix products, attention included: two FLOPs for each
multiplication, and causal attention as if it were not causal. It slows small operations down, so FLOPs are counted in
an iteration that is not timed, and scaled by the positions that each iteration computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count


class Counter:
    """Counts positions from the start, and FLOPs between :meth:`start` and :meth:`stop`."""

    def __init__(self) -> None:
        self.positions = 0  # token ids that models embedded, padding included
        self.mode: FlopCounterMode | None = None
        embedding = torch.nn.functional.embedding

        def counted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.positions += ids.numel()
            return embedding(ids, *args, **kwargs)

        torch.nn.functional.embedding = counted

    def start(self) -> None:
        self.mode = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self.mode.__enter__()

    def stop(self) -> None:
        if self.mode:
            self.mode.__exit__(None, None, None)
        self.mode = None

    @property
    def flops(self) -> int:
        return self.mode.get_total_flops() if self.mode else 0


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, _with_heads_of(query, key), _with_heads_of(query, value)))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, _with_heads_of(query, key), _with_heads_of(query, value)))


def _with_heads_of(query: Any, shape: Any) -> Any:
    """The shape of keys or values that query heads do not share. Torch before 2.13 refuses those that are shared."""
    rows, _, length, size = shape
    return rows, query[1], length, size


def _in_place(*shapes: Any, **kwargs: Any) -> int:
    return int(addmm_flop(*shapes))


KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
FORMULAS = {  # of operations that torch's counter does not know in all versions; the functions get shapes
    torch.ops.aten.addmm_: _in_place,
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): _attention for kernel in KERNELS},
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in KERNELS},
}


def matrix_rate(dtype: torch.dtype, clock: Callable[[], float], repeats: int = 10) -> float:
    """FLOPs per second of a large product of square matrices on this process's device, the best of ``repeats``."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds[1:])
