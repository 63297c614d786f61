"""RAHF: moves a policy's hidden states from those of bad answers to those of good ones (arXiv 2312.15997).

There is no reward model and no sampling. A run has three steps, in this order in ``trainer.py``:

1. Contrast: adapters learn what good answers are, and what bad ones are.
2. Difference: of the hidden states that good and bad give to the same answers.
3. Fit: the policy learns to have its own hidden states, moved by a multiple of that difference.
"""

from typing import Any

from alignkit import HiddenStates, Loss, Plan, Ranking, Run, Stage, hookimpl
from alignkit_rahf import config, losses


def build(run: Run) -> Any:
    """Build the trainer. Imports torch."""
    from alignkit_rahf.trainer import build

    return build(run)


def in_memory(plan: Plan) -> str:
    """The models that the plan reports as in memory."""
    contrast = ", ".join(["reference", *config.adapters(plan.config.stage.config)])
    if plan.config.tuner.component.adapters:
        return f"policy, {contrast} on one base"
    return f"policy by itself, {contrast} on one base"


@hookimpl
def alignkit_stage() -> list[Stage]:
    phases = "no metric is comparable between the contrast and the fit"
    return [
        Stage(
            name="rahf",
            summary="representation alignment: hidden states move from those of bad answers to those of good ones",
            config=config.RAHFConfig,
            check=config.check,
            build=build,
            shards=True,
            less_memory=config.less_memory,
            finish=lambda run, trainer: {"layers": trainer.layers},  # joins the manifest
            in_memory=in_memory,
            rows=(Ranking,),
            batch=HiddenStates,
            loss="distance",
            data="bundled:rankings",
            data_of="rm",
            needs={"policy": "sft"},
            watch=("contrast_accuracy", "accuracy", "margin", "kl"),
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
            resume={"num_train_epochs": "same", "max_steps": "same"},  # they decide where the contrast ends
            refuses={
                "neftune_noise_alpha": "hidden states are compared without noise",
                "train_sampling_strategy=group_by_length": "a pair has two answers, and so no length of its own",
                "train_sampling_strategy=batch_rebalance": "a pair has two answers, and so no length of its own",
                "lr_scheduler_type=reduce_lr_on_plateau": phases,
                "lr_scheduler_type=greedy": phases,
                "load_best_model_at_end": phases,
                "metric_for_best_model": phases,
                "greater_is_better": phases,
                "save_strategy=best": phases,
                "gradient_checkpointing_kwargs": "each layer is recomputed with the adapter that computed it",
                "activation_checkpointing_kwargs": "each layer is recomputed with the adapter that computed it",
                "eval_accumulation_steps": "set train.per_device_eval_batch_size",
                "deepspeed": "remove it here; for another stage alone, set it as in sft.train.deepspeed",
            },
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="distance",
            summary="the distance of hidden states to where they should be",
            batch=HiddenStates,
            build=losses.build_distance,
        )
    ]
