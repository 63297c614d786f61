"""Attention in training on a CPU: plain matrix products where they are faster than torch's fused kernel."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 128  # tokens in a row, up to which plain products are faster (torch 2.13, AVX-512 with AMX)


def plain_products_are_faster(input_ids: torch.Tensor) -> bool:
    """Whether to compute the attention of rows of token ids [R, T] by plain products.

    The backward pass of the fused kernel for CPUs takes up to three times as long on short rows in 16 bits, and rounds
    more: plain products are computed in fp32.
    """
    return (
        input_ids.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and input_ids.shape[1] <= SHORT
    )


def plain_products(used: bool) -> contextlib.AbstractContextManager[None]:
    """Compute attention by plain products meanwhile, if ``used``."""
    return sdpa_kernel(SDPBackend.MATH) if used else contextlib.nullcontext()
