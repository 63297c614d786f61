"""Differences between a GPU and the CPU on which a plan runs its steps. Importing this module imports torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from alignkit.models import token_logps
from alignkit.models.trl_internals import head_in_place
from alignkit.planning.ledger import GIB
from alignkit.planning.replaced import replaced
from alignkit.planning.weightless import Linear4bit

GPU_MEMORY = 24 * GIB  # of a GPU that is not at hand
CONTEXT = int(0.6 * GIB)  # estimate: CUDA's context; on an H100 it takes 0.65 GiB
FRAGMENTATION = 0.05  # of tensors, that the blocks of the allocator are larger; up to 0.045 on an H100
HOPPER = 9, 0  # compute capability
WORKSPACES = ":4096:2:16:8", ":4096:8"  # of cuBLAS, pairs of KiB and a number: by default, and from Hopper on


@contextlib.contextmanager
def as_on_cuda(gpu_memory: int | None) -> Iterator[None]:
    """Compute log-probabilities as on a GPU with ``gpu_memory`` bytes; None: on that of this machine, or of 24 GiB."""
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU_MEMORY
    number = token_logps.logits_on(gpu_memory or here)
    with replaced(token_logps, logits_at_a_time=lambda device: number), head_in_place():
        yield


def share_inputs(model: Any) -> None:
    """Let LoRA layers on 4-bit weights use their input as it is under autocast, as on a GPU. PEFT casts it on a CPU."""
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), Linear4bit):
            module.register_forward_pre_hook(_share_input)


def _share_input(module: Any, inputs: Any) -> None:
    module.cast_input_dtype_enabled = not torch.is_autocast_enabled("cpu")


def overhead(tensors: int) -> int:
    """The bytes that CUDA and PyTorch's allocator take beside tensors."""
    return CONTEXT + int(FRAGMENTATION * tensors)


def cublas_workspaces() -> int:
    """The bytes of cuBLAS's workspaces: one for the forward and one for the backward pass, which has its own thread.

    PyTorch's allocator has them. Without a GPU at hand they are as large as on Hopper, where they are largest.
    """
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= HOPPER
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[hopper])
    return 2 * sum(int(size) * int(number) * 1024 for size, number in re.findall(r":(\d+):(\d+)", config))
