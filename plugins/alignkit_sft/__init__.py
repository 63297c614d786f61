"""Supervised fine-tuning on demonstrations, InstructGPT's first stage; and its loss."""

from typing import Any

from alignkit import Demonstration, Loss, Run, Stage, Text, TokenLogps, hookimpl
from alignkit_sft import config, nll
from alignkit_sft.config import SFTConfig

__all__ = ["SFTConfig", "build"]


def build(run: Run) -> Any:
    """Build the trainer. Imports torch."""
    from alignkit_sft.trainer import build

    return build(run)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="sft",
            summary="supervised fine-tuning on demonstrations",
            config=SFTConfig,
            build=build,
            less_memory=config.less_memory,
            trains=("weights", "inputs"),
            shards=True,
            rows=(Demonstration, Text),
            batch=TokenLogps,
            loss="nll",
            data="bundled:demonstrations",
            watch=("perplexity",),
            streams=True,
            train={
                "learning_rate": 2e-5,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 8,
                "eval_strategy": "steps",
                "eval_steps": 0.5,
                "eval_on_start": True,
                "save_steps": 0.5,
                "logging_steps": 0.05,
            },
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [Loss(name="nll", summary="negative log-likelihood of the response", batch=TokenLogps, build=nll.build)]
