"""The reward model, InstructGPT's second stage, trained on prompts with K ranked answers; and its losses."""

from typing import Any

from alignkit import Loss, RankedScores, Ranking, Run, Stage, hookimpl
from alignkit_rm import losses
from alignkit_rm.config import BradleyTerryConfig, RMConfig, less_memory


def build(run: Run) -> Any:
    """Build the trainer. Imports torch."""
    from alignkit_rm.trainer import build

    return build(run)


def finish(run: Run, trainer: Any) -> dict[str, Any]:
    """Normalize the score and evaluate the model. Imports torch."""
    from alignkit_rm.trainer import finish

    return finish(run, trainer)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="rm",
            summary="a reward model from ranked answers",
            config=RMConfig,
            build=build,
            shards=True,
            less_memory=less_memory,
            finish=finish,
            rows=(Ranking,),
            batch=RankedScores,
            loss="bradley-terry",
            data="bundled:rankings",
            role="reward",
            needs={"policy": "sft"},
            watch=("accuracy",),
            train={
                "learning_rate": 3e-5,
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
            refuses={
                "neftune_noise_alpha": "the answers of a pair would get different noise",
                "train_sampling_strategy=group_by_length": "set rm.forward_tokens, which limits padding too",
                "train_sampling_strategy=batch_rebalance": "set rm.forward_tokens, which limits padding too",
            },
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="bradley-terry",
            summary="log-odds of the better answer, over all pairs of a prompt",
            batch=RankedScores,
            config=BradleyTerryConfig,
            build=losses.bradley_terry,
        ),
        Loss(
            name="plackett-luce",
            summary="likelihood of the whole ranking",
            batch=RankedScores,
            build=losses.plackett_luce,
        ),
    ]
