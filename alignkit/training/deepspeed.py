"""Training with DeepSpeed's ZeRO (``train.deepspeed``): what differs from one process or DDP.

The results do not: trained weights are in fp32 and the forward runs in autocast, as without DeepSpeed. Each process
loads the whole model into main memory; DeepSpeed partitions it when training starts.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from alignkit.errors import ConfigError
from alignkit.models import Roles
from alignkit.models.fused_head import copy_form
from alignkit.protocols import Run

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def arguments(run: Run) -> dict[str, Any]:
    """The arguments of ``TrainingArguments`` with which a run uses DeepSpeed; none if it does not.

    Batch sizes and gradient clipping are those of the ``train`` table. DeepSpeed would use none that its config lacks.

    Raises:
        ConfigError: the run has a single process.
    """
    table = run.config.train.get("deepspeed")
    if not table:
        return {}
    if run.processes == 1:
        raise ConfigError("train.deepspeed needs several processes: alignkit launch --processes N -- train ...")
    zero = {"stage3_gather_16bit_weights_on_model_save": True, **table["zero_optimization"]}
    if zero["stage"] == 3 and run.dtype is not torch.float32:  # it cannot gather weights of two dtypes at once
        zero["stage3_param_persistence_threshold"] = 0
    config = {**dict.fromkeys(AUTO, "auto"), **table, "zero_optimization": zero}
    return {"deepspeed": config, "bf16": False, "fp16": False}


def check_arguments(args: transformers.TrainingArguments, run: Run) -> None:
    """Check that every process knows the others, and have models loaded whole instead of partitioned.

    Raises:
        ConfigError: DeepSpeed counts other processes than the launcher.
    """
    if args.world_size != run.processes:
        raise ConfigError(f"train.deepspeed: DeepSpeed sees {args.world_size} of {run.processes} processes")
    unset_hf_deepspeed_config()


def check_optimizer(build: Any, arguments: dict[str, Any], describe: str) -> None:
    """Check that an optimizer computes the same on the flat partitions of all weights that ZeRO gives it.

    Raises:
        ConfigError: it does not, as optimizers that use the shape or the norm of each weight.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 4, generator=generator), torch.randn(16, generator=generator)]
    gradients = [[torch.randn(w.shape, generator=generator) for w in weights] for _ in range(3)]
    apart, flat = [w.clone() for w in weights], [_flat(weights)]
    for tensors, steps in ((apart, gradients), (flat, [[_flat(step)] for step in gradients])):
        parameters = [nn.Parameter(tensor) for tensor in tensors]
        optimizer = build(parameters, **arguments)
        for step in steps:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient
            optimizer.step()
    if not torch.allclose(_flat(apart), flat[0], rtol=1e-4, atol=1e-6):
        raise ConfigError(
            f"{describe} does not work with train.deepspeed: ZeRO flattens all weights into one, and its steps depend "
            "on the shape of each. Set optimizer.name=adamw"
        )


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def prepare(trainer: transformers.Trainer, run: Run) -> None:
    """Make the models of a trainer compute in the dtype of the run, as ``Accelerator.prepare`` would.

    Raises:
        ConfigError: the trainer has several roles in one module, or ZeRO-3 would partition quantized weights.
    """
    table = run.config.train.get("deepspeed")
    if not table:
        return
    model: Any = trainer.model
    stage = run.config.stage.component.name
    if isinstance(model, Roles):
        raise ConfigError(f"train.deepspeed does not work in stage '{stage}': remove it")
    if table["zero_optimization"]["stage"] == 3 and getattr(model, "is_quantized", False):
        raise ConfigError(
            "train.deepspeed: ZeRO-3 does not work with a quantized base. Set zero_optimization.stage to 2, or choose "
            "another tuner"
        )
    if (reference := getattr(trainer, "ref_model", None)) is not None:
        copy_form(model, reference)
    if run.dtype is torch.float32:
        return
    kind, dtype = run.device.type, run.dtype

    def autocast(*_: Any, **__: Any) -> torch.autocast:
        return torch.autocast(kind, dtype, cache_enabled=False)  # a cache would keep gathered weights

    trainer.accelerator.autocast = autocast
    for each in (model, reference):
        if each is not None:
            inner = getattr(each, "module", each)
            inner.forward = autocast()(inner.forward)
