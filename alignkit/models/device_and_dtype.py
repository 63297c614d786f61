"""The device and the dtype of a run."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alignkit.config.model_kwargs import FLASH
from alignkit.errors import ConfigError
from alignkit.models import transformers_internals

if TYPE_CHECKING:
    import transformers


def run_device(train: Mapping[str, Any]) -> torch.device:
    """The accelerator of this process (CUDA, XPU, MPS, ...); the CPU if there is none or ``train.use_cpu`` is set.

    Raises:
        ConfigError: this machine has fewer accelerators than processes.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if train.get("use_cpu") or accelerator is None:
        return torch.device("cpu")
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if processes > devices:
        raise ConfigError(
            f"{processes} processes need {processes} GPUs, and this machine has {devices}. Start one process for each "
            "GPU, or set train.use_cpu=true"
        )
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def run_dtype(train: Mapping[str, Any]) -> torch.dtype:
    """The dtype that ``bf16`` or ``fp16`` in the ``train`` table selects, else the fastest suitable one.

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


def check_loading(kwargs: Mapping[str, Any], device: torch.device, dtype: torch.dtype, processes: int) -> None:
    """Check that a model can be trained as ``kwargs``, arguments of ``from_pretrained``, load it.

    ``dtype`` is the dtype of training.

    Raises:
        ConfigError: its attention, its placement or the dtype of its weights does not fit the run.
    """
    if reason := _attention_problem(kwargs, device):
        raise ConfigError(f"model_kwargs.attn_implementation: {reason}. Remove it, or choose sdpa")
    if "flash" in kwargs.get("attn_implementation", "") and dtype is torch.float32:
        raise ConfigError(
            "model_kwargs.attn_implementation: flash attention computes in 16 bits, and this run in fp32. Set "
            "train.bf16=true, or choose sdpa"
        )
    weights = kwargs["dtype"] if isinstance(kwargs["dtype"], torch.dtype) else getattr(torch, kwargs["dtype"])
    if weights is torch.float16 and dtype is torch.float32:
        raise ConfigError(
            "tuner.dtype=float16: this run trains in fp32, without the loss scaling that fp16 needs, so small "
            "gradients would be lost. Choose bfloat16"
        )
    if "device_map" in kwargs:
        _check_device_map(kwargs["device_map"], device, processes)


def _check_device_map(device_map: Any, device: torch.device, processes: int) -> None:
    if processes > 1:
        raise ConfigError("model_kwargs.device_map: with several processes, each loads its own models. Remove it")
    target = device_map[""] if isinstance(device_map, dict) else device_map
    if target not in ("auto", device.type, str(device), device.index):
        raise ConfigError(f"model_kwargs.device_map is {target}, and this run computes on {device}. Remove it")


def usable(kwargs: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` to open a finished run on this machine, which may not be that of its training.

    Where its attention does not work here, that of Transformers is used: the results are equal up to rounding. On a CPU
    weights in fp16 are loaded in fp32. ``say`` gets a line.
    """
    device, kwargs = run_device({}), dict(kwargs)
    if reason := _attention_problem(kwargs, device):
        say(f"{reason}: using Transformers' default attention instead")
        del kwargs["attn_implementation"]
    if kwargs["dtype"] in (torch.float16, "float16") and device.type == "cpu":
        kwargs["dtype"] = torch.float32
    return kwargs


def _attention_problem(kwargs: Mapping[str, Any], device: torch.device) -> str | None:
    """Why the attention of ``kwargs`` does not work on a device; None if it does."""
    name = kwargs.get("attn_implementation", "")
    if "flash" not in name:
        return None
    if device.type == "cpu":
        return f"{name} does not work on a CPU"
    packages = FLASH[name]
    if any(map(importlib.util.find_spec, packages)):
        return None
    return f"{name} needs {packages[0]}, which is not installed"


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype in which a forward pass of ``model`` computes here: that of autocast, or of its weights."""
    kind = model.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return dtype


def dtype_of_run(record: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a finished run was computed. ``record`` is its manifest.

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
            f"training on one of {args.n_gpu} GPUs. To use all of them: alignkit launch --processes {args.n_gpu} "
            "-- train ..."
        )
        transformers_internals.train_on_one_gpu(args)
