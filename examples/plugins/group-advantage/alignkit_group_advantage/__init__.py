"""A stage that compares the answers to one prompt with each other: no value function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from alignkit import Loss, LossOutput, PolicyBatch, Run, Stage, hookimpl, option
from alignkit.online import OnlineConfig, online_stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GroupConfig(OnlineConfig):
    """The ``group-advantage`` table: what every online stage has, and one setting more."""

    samples_per_prompt: Annotated[int, Ge(2)] = option(4, "answers per prompt, which are compared with each other")
    scale: bool = option(True, "divide advantages by the standard deviation of the group's scores")


@dataclass(frozen=True)
class ClipConfig:
    """The ``loss`` table of ``group-clip``."""

    cliprange: Annotated[float, Gt(0)] = option(
        0.2, "clip range of the probability ratio: 1 - cliprange to 1 + cliprange"
    )


def group_clip(config: ClipConfig) -> Callable[[PolicyBatch], LossOutput]:
    """Clipped surrogate objective (arXiv 1707.06347, eq. 7): a mean over the response tokens of the step."""

    def loss(batch: PolicyBatch) -> LossOutput:
        import torch

        ratio = (batch.logps - batch.old_logps).exp()
        clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
        per_token = -torch.minimum(batch.advantages * ratio, batch.advantages * clipped)

        def mean(values: Tensor) -> Tensor:
            return (values * batch.mask).sum() / batch.num_tokens

        outside = ((ratio.detach() - 1).abs() > config.cliprange).float()
        return LossOutput(mean(per_token), {"clip_fraction": mean(outside)})

    return loss


def build(run: Run) -> Any:
    """The trainer; imports torch."""
    from alignkit.online import build_trainer
    from alignkit_group_advantage.trainer import GroupTrainer

    return build_trainer(run, GroupTrainer)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        online_stage(
            name="group-advantage",
            summary="advantages from groups of answers to one prompt, without a value function",
            config=GroupConfig,
            build=build,
            loss="group-clip",
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="group-clip",
            summary="clipped surrogate objective without a value loss",
            batch=PolicyBatch,
            config=ClipConfig,
            build=group_clip,
        )
    ]
