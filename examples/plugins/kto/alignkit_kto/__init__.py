"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306): learn from single answers that are labelled good or bad.

A stage with a type of row, a data format, a batch type and a loss of its own. Everything that needs torch is in
``trainer.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from alignkit import (
    Conversation,
    DataError,
    DataFormat,
    Loss,
    LossOutput,
    Ranking,
    Run,
    Stage,
    fields_of,
    hookimpl,
    option,
)
from alignkit_formats import messages, prompt_completion

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


# --- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """One answer to a prompt, and whether it is good."""

    prompt: Conversation
    answer: str
    good: bool

    @property
    def key(self) -> str:
        """Rows with the same key are held out together: the prompt."""
        return "\n".join(message["content"] for message in self.prompt)


def judgement(row: Mapping[str, Any]) -> Judgement:
    """TRL's ``prompt``, ``completion``, ``label``, or LLaMA-Factory's ``messages``, ``label``.

    Raises:
        DataError: a field is missing or invalid.
    """
    if not isinstance(row["label"], bool):
        raise DataError(f"'label' must be true or false, not {row['label']!r}")
    read = messages if row.get("messages") is not None else prompt_completion
    demonstration = read({key: value for key, value in row.items() if key != "label"})
    *prompt, answer = demonstration.messages
    if demonstration.tools or "tool_calls" in answer:
        raise DataError("tools and tool_calls: only answers in text can be judged")
    return Judgement(prompt, answer["content"], row["label"])


def judgements(row: Judgement | Ranking) -> list[Judgement]:
    """The answers of a ranking: good above the mean rank, bad below it; those at the mean are left out."""
    if isinstance(row, Judgement):
        return [row]
    middle = statistics.fmean(row.ranks)
    ranked = zip(row.answers, row.ranks, strict=True)
    return [Judgement(row.prompt, answer, rank < middle) for answer, rank in ranked if rank != middle]


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgedLogps:
    """The input of the loss: log-probabilities of B answers, each summed, under the policy and the reference."""

    logps: Tensor  # [B]
    ref_logps: Tensor  # [B]
    good: Tensor  # [B] bool
    kl: Tensor  # scalar, at least 0: the KL to the reference, estimated from answers to other prompts


@dataclass(frozen=True)
class KtoLossConfig:
    """The ``loss`` table of ``kto``."""

    beta: Annotated[float, Gt(0)] = option(0.1, "strength of the penalty for moving away from the reference")
    good_weight: Annotated[float, Ge(0)] = option(1.0, "weight of good answers")
    bad_weight: Annotated[float, Ge(0)] = option(1.0, "weight of bad answers")


def kto(config: KtoLossConfig) -> Callable[[JudgedLogps], LossOutput]:
    """Equation 7 of the paper: mean of weight * (1 - sigmoid(±beta * (r - kl))), with + for good answers and - for bad.

    r is the log-ratio of policy and reference for an answer.
    """

    def loss(batch: JudgedLogps) -> LossOutput:
        sign = batch.good.float() * 2 - 1
        weight = config.good_weight * batch.good + config.bad_weight * ~batch.good
        gain = config.beta * (batch.logps - batch.ref_logps - batch.kl) * sign
        return LossOutput((weight * (1 - gain.sigmoid())).mean())

    return loss


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KtoConfig:
    """The ``kto`` table."""

    max_length: Annotated[int, Gt(0)] = option(1024, "tokens of prompt and answer together; a longer row is an error")


def build(run: Run) -> Trainer:
    """Build the trainer; imports torch."""
    from alignkit_kto.trainer import build

    return build(run)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="kto",
            summary="KTO: preference tuning on single answers labelled good or bad",
            config=KtoConfig,
            build=build,
            rows=(Ranking, Judgement),
            batch=JudgedLogps,
            loss="kto",
            data="bundled:rankings",
            needs={"policy": "sft"},
            watch=("margin",),
            train={
                "learning_rate": 1e-6,
                "num_train_epochs": 1,
                "warmup_steps": 0.1,
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
def alignkit_data() -> list[DataFormat]:
    return [
        DataFormat(
            name="judgements",
            summary="label (true or false) with prompt and completion, or with messages",
            fits=lambda row: max(fields_of("prompt", "completion", "label")(row), fields_of("messages", "label")(row)),
            convert=judgement,
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [Loss(name="kto", summary="KTO's value of an answer", config=KtoLossConfig, batch=JudgedLogps, build=kto)]
