"""Reward-weighted regression: imitate answers, those with a higher score more (arXiv 1910.00177).

A stage with a type of row, a data format, a batch type and a loss of its own. Everything that needs torch is in
``trainer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from alignkit import Conversation, DataError, DataFormat, Loss, LossOutput, Row, Run, Stage, fields_of, hookimpl, option
from alignkit_formats import prompt_completion

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


# --- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One answer to a prompt, and its score."""

    prompt: Conversation
    answer: str
    score: float

    @property
    def key(self) -> str:
        """Rows with the same key are held out together: the prompt."""
        return "\n".join(message["content"] for message in self.prompt)


FIELDS = (
    ("prompt", "response", "score"),
    ("prompt", "completion", "score"),
    ("prompt", "responses", "scores"),
    ("prompt", "responses", "scores", "ranks"),  # of scored rankings
)


def scored(row: Mapping[str, Any]) -> list[Row]:
    """``prompt``, ``response``, ``score`` or ``prompt``, ``responses``, ``scores``, as ``alignkit score`` writes them.

    Raises:
        DataError: a field is missing or invalid.
    """
    if row.get("responses") is None:
        return [_scored(row, row.get("score"))]
    answers, scores = row["responses"], row.get("scores")
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise DataError("'responses' and 'scores' must be lists of the same length")
    parts = ({"prompt": row.get("prompt"), "response": answer} for answer in answers)
    return [_scored(part, score) for part, score in zip(parts, scores, strict=True)]


def _scored(row: Mapping[str, Any], score: Any) -> Scored:
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"the score is {score!r}: it must be a finite number")
    *prompt, answer = prompt_completion(row).messages
    return Scored(prompt, answer["content"], float(score))


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredLogps:
    """The input of the loss: B answers of a microbatch, and the scores of all N answers to train on."""

    logps: Tensor  # [B] log-probability of each answer, summed over its tokens
    scores: Tensor  # [B]
    all_scores: Tensor  # [N]
    num_tokens: Tensor | int  # tokens of the answers of the whole optimizer step


@dataclass(frozen=True)
class RewardWeightedConfig:
    """The ``loss`` table of ``reward-weighted``."""

    beta: Annotated[float, Gt(0)] = option(1.0, "temperature: how many points of score make a weight e times larger")
    max_weight: Annotated[float, Gt(1)] = option(20.0, "weights are clipped to this value before normalization")


def weights(config: RewardWeightedConfig, scores: Tensor, all_scores: Tensor) -> Tensor:
    """The weights of answers [B]: exp((score - mean) / beta), clipped, with a mean of 1 over all N answers."""

    def clipped(values: Tensor) -> Tensor:
        # clipped in the exponent, which cannot overflow
        return ((values - all_scores.mean()) / config.beta).clamp(max=math.log(config.max_weight)).exp()

    return clipped(scores) / clipped(all_scores).mean()


def reward_weighted(config: RewardWeightedConfig) -> Callable[[ScoredLogps], LossOutput]:
    """AWR (arXiv 1910.00177, eq. 10), with the mean score as the baseline: -sum(weight * log p) per token of the step.

    With equal scores, all weights are 1, and this is the loss of SFT.
    """

    def loss(batch: ScoredLogps) -> LossOutput:
        weight = weights(config, batch.scores, batch.all_scores)
        return LossOutput(-(weight * batch.logps).sum() / batch.num_tokens)

    return loss


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageConfig:
    """The ``reward-weighted`` table."""

    max_length: Annotated[int, Ge(2)] = option(1024, "tokens of prompt and answer together; a longer row is an error")


def build(run: Run) -> Trainer:
    """Build the trainer; imports torch."""
    from alignkit_reward_weighted.trainer import build

    return build(run)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="reward-weighted",
            summary="reward-weighted regression: imitates answers with a high score more",
            config=StageConfig,
            build=build,
            rows=(Scored,),
            batch=ScoredLogps,
            loss="reward-weighted",
            needs={"policy": "sft"},
            train={"learning_rate": 1e-5, "num_train_epochs": 1, "eval_strategy": "epoch", "eval_on_start": True},
        )
    ]


@hookimpl
def alignkit_data() -> list[DataFormat]:
    return [
        DataFormat(
            name="scored",
            summary="prompt, response, score; or prompt, responses, scores",
            fits=lambda row: max(fields_of(*names)(row) for names in FIELDS),
            convert=scored,
            rows=(Scored,),
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="reward-weighted",
            summary="log-likelihood, weighted by exponentiated scores",
            batch=ScoredLogps,
            config=RewardWeightedConfig,
            build=reward_weighted,
        )
    ]
