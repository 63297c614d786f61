"""A stage, a loss and a rollout engine as they were written for the plugin API of a30788b, whose modules have moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from alignkit import Demonstration, Loss, LossOutput, NoConfig, Rollout, Sampling, Stage, TokenLogps, hookimpl, option

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FocalConfig:
    """The ``loss`` table."""

    gamma: Annotated[float, Ge(0)] = option(2.0, "how much less an easy token counts; 0: all count the same")


def focal(config: FocalConfig) -> Callable[[TokenLogps], LossOutput]:
    def loss(batch: TokenLogps) -> LossOutput:
        weights = (1 - batch.logps.exp()) ** config.gamma  # [B, T]
        return LossOutput(-(weights * batch.logps * batch.mask).sum() / batch.num_tokens)

    return loss


def build_stage(run: Any) -> Any:
    from alignkit.chat_template import IGNORE, encode  # noqa: F401

    raise NotImplementedError


def build_rollout(config: NoConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Any:
    from alignkit.sampling import sample

    def one_by_one(policy: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        return [answer for prompt in prompts for answer in sample(policy, tokenizer, [prompt], sampling)]

    return one_by_one


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [Loss(name="old-focal", summary="hard tokens count more", batch=TokenLogps, config=FocalConfig, build=focal)]


@hookimpl
def alignkit_rollout() -> list[Rollout]:
    return [Rollout(name="old-one-by-one", summary="one prompt at a time", build=build_rollout)]


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="old-stage",
            summary="fine-tuning on demonstrations",
            build=build_stage,
            rows=(Demonstration,),
            batch=TokenLogps,
            loss="nll",
            data="bundled:demonstrations",
            train={"learning_rate": 2e-5, "num_train_epochs": 1, "eval_strategy": "epoch", "eval_on_start": True},
        )
    ]
