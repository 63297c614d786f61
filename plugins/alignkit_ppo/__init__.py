"""PPO with a KL penalty to the SFT model, the third of InstructGPT's three stages, and its losses."""

from typing import Any

from alignkit import Loss, PolicyBatch, Run, Stage, hookimpl
from alignkit.online import online_stage
from alignkit_ppo import losses
from alignkit_ppo.config import PPOConfig


def build(run: Run) -> Any:
    """The trainer; imports torch."""
    from alignkit_ppo.trainer import build

    return build(run)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        online_stage(
            name="ppo",
            summary="PPO against a reward, with a KL penalty to the SFT model",
            config=PPOConfig,
            build=build,
            shards=True,
            loss="ppo-clip",
            less_memory=lambda config: [{"value": "head"}] if config.value == "adapter" else [],
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="ppo-clip",
            summary="clipped surrogate objective and clipped value loss",
            batch=PolicyBatch,
            config=losses.ClipConfig,
            build=losses.ppo_clip,
        ),
        Loss(
            name="ppo-dual-clip",
            summary="ppo-clip with a bounded loss for negative advantages (dual-clip PPO)",
            batch=PolicyBatch,
            config=losses.DualClipConfig,
            build=losses.ppo_dual_clip,
        ),
    ]
