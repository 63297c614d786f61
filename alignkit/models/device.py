"""Which device a run computes on, and in which number format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from alignkit.errors import ConfigError
from alignkit.models import transformers_internals

if TYPE_CHECKING:
    import transformers


def run_device(train: Mapping[str, Any]) -> torch.device:
    """The accelerator of this process (CUDA, XPU, MPS, ...) where there is one and ``train.use_cpu`` is not set."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if train.get("use_cpu") or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def run_dtype(train: Mapping[str, Any]) -> torch.dtype:
    """What the ``train`` table says with ``bf16`` or ``fp16``; else the fastest that the device does well.

    That is bf16 where the hardware multiplies it, fp16 on older GPUs unless ``fp16`` is false, and fp32 elsewhere.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    kind = run_device(train).type
    if train.get("fp16"):
        if kind == "cpu":
            raise ConfigError("train.fp16: a CPU has no loss scaling, so that small gradients are lost: remove it")
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


def one_gpu(args: transformers.TrainingArguments, say: Callable[[str], None]) -> None:
    """Train on one GPU where no launcher has started a process for each: the Trainer would use ``DataParallel``.

    That would multiply the batch by the number of GPUs, and most losses are not written for it.
    """
    if args.n_gpu > 1:
        say(
            f"training on one of {args.n_gpu} GPUs. To use all of them: torchrun --nproc_per_node {args.n_gpu} "
            "-m alignkit train ..."
        )
        transformers_internals.train_on_one_gpu(args)
