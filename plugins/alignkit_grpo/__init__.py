"""GRPO: advantages from groups of answers to one prompt, without a value function; RLOO and Dr. GRPO as presets."""

from typing import Any

from alignkit import Loss, PolicyBatch, Run, Stage, hookimpl
from alignkit.online import online_stage
from alignkit_grpo import losses
from alignkit_grpo.config import DrGRPOConfig, GRPOConfig, RLOOConfig

STAGES = [  # name, config, loss, summary
    (
        "grpo",
        GRPOConfig,
        "grpo-clip",
        "PPO without a value function, on groups of answers that are compared with each other",
    ),
    ("dr-grpo", DrGRPOConfig, "grpo-clip", "GRPO without division by a group's deviation or an answer's length"),
    ("rloo", RLOOConfig, "reinforce", "REINFORCE with the other answers to a prompt as the baseline"),
]


def build(run: Run) -> Any:
    """The trainer; imports torch."""
    from alignkit.online import build_trainer
    from alignkit_grpo.trainer import GRPOTrainer

    return build_trainer(run, GRPOTrainer)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        online_stage(name=name, summary=summary, config=config, build=build, loss=loss, shards=True)
        for name, config, loss, summary in STAGES
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="grpo-clip",
            summary="clipped surrogate objective; its clip range may be asymmetric",
            batch=PolicyBatch,
            config=losses.ClipConfig,
            build=losses.grpo_clip,
        ),
        Loss(
            name="reinforce",
            summary="log-probabilities times advantages, for one optimizer step per batch",
            batch=PolicyBatch,
            config=losses.ReinforceConfig,
            build=losses.reinforce,
        ),
    ]
