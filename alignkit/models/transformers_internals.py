"""Uses of Transformers, accelerate and torch that are not their public API.

Each use names the version that it was checked with. ``tests/test_internals.py`` fails when a release changes one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer  # Transformers 5.23: the base of decoder layers
from transformers.trainer_callback import ExportableState  # Transformers 5.23: what the Trainer saves of a callback

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = [
    "CHECKPOINT_READERS",
    "ExportableState",
    "GradientCheckpointingLayer",
    "attention_of",
    "check_report_to",
    "cpu_multiplies_bf16",
    "forward_without_autocast",
    "has_static_shapes",
    "is_transposed",
    "load_balancing_loss",
    "loading_in_turn",
    "read_optimizer_on_every_process",
    "restore_unlogged_loss",
    "set_learning_rates",
    "train_on_one_gpu",
    "unlogged_loss",
]

# The methods of the Trainer that read a checkpoint (Transformers 5.23)
CHECKPOINT_READERS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state")


def attention_of(config: Any) -> str | None:
    """The attention that a model computes with, such as ``"sdpa"`` (Transformers 5.23)."""
    return getattr(config, "_attn_implementation", None)


def has_static_shapes(model: Any) -> bool:
    """Whether a model computes a token over a cache of fixed length, as ``torch.compile`` needs (Transformers 5.23)."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def is_transposed(module: Any) -> bool:
    """Whether a layer has its weight as [in, out], as GPT-2's have (Transformers 5.23)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def forward_without_autocast(model: Any) -> Any:
    """A model's forward as it was before ``Accelerator.prepare`` wrapped it in autocast (accelerate 1.15).

    ``Accelerator.unwrap_model(keep_fp32_wrapper=False)`` would remove the wrapper for good.
    """
    return getattr(model, "_original_forward", model.forward)


def load_balancing_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The auxiliary loss of a mixture of experts, from its trunk's router logits (Transformers 5.23).

    It is the loss that the model's own forward returns as ``aux_loss``. All families share Mixtral's function.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss: Tensor = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    return loss


@contextlib.contextmanager
def loading_in_turn() -> Iterator[None]:
    """Have ``from_pretrained`` read one weight after the other in this context (Transformers 5.23).

    By default its threads read ahead, which keeps more weights in memory. There is no argument for it.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def check_report_to(args: TrainingArguments) -> None:
    """Whether the packages behind ``train.report_to`` are installed, as the Trainer checks it (Transformers 5.23).

    Raises:
        ImportError, ValueError: they are not, or there is no such integration.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    get_reporting_integration_callbacks(args.report_to)


def train_on_one_gpu(args: TrainingArguments) -> None:
    """Have the Trainer use one of several visible GPUs, without ``DataParallel`` (Transformers 5.23)."""
    args._n_gpu = 1


def set_learning_rates(schedule: Any, optimizer: Any, rates: list[Any]) -> None:
    """Set the rate of each parameter group, and the rates that the Trainer logs, ``get_last_lr()`` (torch 2.13)."""
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 that torch uses (torch 2.13)."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def read_optimizer_on_every_process(trainer: Any) -> None:
    """Make a Trainer read the optimizer's state on all processes when the first one saves it (Transformers 5.23)."""
    save = trainer._save_optimizer_and_scheduler

    def read_and_save(folder: str) -> None:
        if not trainer.args.should_save:
            trainer.optimizer.state_dict()
        save(folder)

    trainer._save_optimizer_and_scheduler = read_and_save


def unlogged_loss(trainer: Any) -> tuple[float, int]:
    """The sum of this process's losses since the Trainer last logged them, and the step then (Transformers 5.23)."""
    return float(trainer._tr_loss), int(trainer._globalstep_last_logged)


def restore_unlogged_loss(trainer: Any, loss: float, step: int, mean: float) -> None:
    """Let a Trainer that begins to train go on from an :func:`unlogged_loss` (Transformers 5.23).

    ``mean`` is that of all processes: the Trainer's own summary is of the steps that it makes now.
    """
    trainer._tr_loss += loss
    trainer._globalstep_last_logged = step
    trainer._total_loss_scalar -= mean
