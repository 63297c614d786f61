"""KTO: trains a policy on answers that are rated good or bad, each by itself (arXiv 2402.01306)."""

from typing import Any

from alignkit import Loss, Ranking, Rated, RatedLogps, Run, Stage, hookimpl
from alignkit.models import describe_reference
from alignkit_kto import losses, ratings
from alignkit_kto.config import KTOConfig, KTOLossConfig, less_memory


def build(run: Run) -> Any:
    """Build the trainer. Imports torch."""
    from alignkit_kto.trainer import build

    return build(run)


IN_BATCHES = "kto shuffles the rows once: the answers of a batch estimate its KL"


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="kto",
            summary="Kahneman-Tversky optimization on answers rated good or bad, in place of rm and ppo",
            config=KTOConfig,
            check=ratings.check,
            build=build,
            shards=True,
            less_memory=less_memory,
            in_memory=describe_reference,
            note=ratings.note,
            rows=(Rated, Ranking),
            batch=RatedLogps,
            loss="kto",
            data="bundled:rankings",
            data_of="rm",
            needs={"policy": "sft"},
            watch=("accuracy", "margin", "kl"),
            train={
                "learning_rate": 2e-6,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 8,
                "eval_strategy": "steps",
                "eval_steps": 0.5,
                "eval_on_start": True,
                "save_steps": 0.5,
                "logging_steps": 0.05,
            },
            resume=dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), "same"),
            refuses={
                "deepspeed": "remove it here; for another stage alone, set it as in sft.train.deepspeed",
                "neftune_noise_alpha": "KTO compares exact log-probabilities with those of the reference",
                "train_sampling_strategy=random": IN_BATCHES,
                "train_sampling_strategy=group_by_length": IN_BATCHES,
                "train_sampling_strategy=batch_rebalance": IN_BATCHES,
            },
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="kto",
            summary="KTO: raises good answers over the KL to the reference, and lowers bad ones under it",
            batch=RatedLogps,
            config=KTOLossConfig,
            build=losses.kto,
        )
    ]
