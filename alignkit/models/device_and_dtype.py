"""The device and the number format of a run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alignkit.errors import ConfigError
from alignkit.models import transformers_internals

if TYPE_CHECKING:
    import transformers


def run_device(train: Mapping[str, Any]) -> torch.device:
    """The accelerator of this process (CUDA, XPU, MPS, ...); the CPU if there is none or ``train.use_cpu`` is set."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if train.get("use_cpu") or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def run_dtype(train: Mapping[str, Any]) -> torch.dtype:
    """The number format that ``bf16`` or ``fp16`` in the ``train`` table selects, else the fastest suitable one.

    That is bf16 if the hardware supports it, fp16 on older GPUs unless ``fp16`` is false, and fp32 elsewhere.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    kind = run_device(train).type
    if train.get("fp16"):
        if kind == "cpu":
            raise ConfigError("train.fp16: a CPU has no loss scaling, so small gradients are lost: remove it")
        return torch.float16
    if "bf16" in train:
        return torch.bfloat16 if train["bf16"] else torch.float32
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32 if "fp16" in train else torch.float16
    if kind == "xpu" or (kind == "cpu" and transformers_internals.cpu_multiplies_bf16()):
        return torch.bfloat16
    return torch.float32


def compute_dtype(model: Any) -> torch.dtype:
    """The number format in which a forward pass of ``model`` computes here: that of autocast, or of its weights."""
    kind = model.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return dtype


def dtype_of_run(record: Mapping[str, Any]) -> torch.dtype:
    """The number format in which a finished run was computed. ``record`` is its manifest.

    On a CPU it is fp32 in place of fp16, which few of its operations support.
    """
    dtype: torch.dtype = getattr(torch, record["dtype"])
    return torch.float32 if dtype is torch.float16 and run_device({}).type == "cpu" else dtype


def cast_frozen_linears(model: nn.Module, dtype: torch.dtype, keep: Collection[nn.Module] = ()) -> None:
    """Store frozen linear layers in ``dtype``, to which autocast casts them in every forward pass: the same results.

    Layers that are trained, quantized, in ``keep``, or share their weight with another module, as a tied head does with
    the embeddings, are left as they are.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module in model.modules():
        if type(module) is nn.Linear and not any(module is head for head in keep):
            parameters = list(module.parameters(recurse=False))
            if not any(p.requires_grad or uses[id(p)] > 1 for p in parameters):
                module.to(dtype)


def one_gpu(args: transformers.TrainingArguments, say: Callable[[str], None]) -> None:
    """Train on one GPU if several are visible to one process. The Trainer would use ``DataParallel`` on all of them.

    That would multiply the batch size by the number of GPUs, and most losses do not support it.
    """
    if args.n_gpu > 1:
        say(
            f"training on one of {args.n_gpu} GPUs. To use all of them: torchrun --nproc_per_node {args.n_gpu} "
            "-m alignkit train ..."
        )
        transformers_internals.train_on_one_gpu(args)
