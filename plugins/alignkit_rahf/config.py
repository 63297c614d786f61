"""The settings of the stage, and which layers are the default. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from alignkit import ConfigError, DataError, Located, Plan, Ranking, halvings, option


@dataclass(frozen=True)
class RAHFConfig:
    """The ``rahf`` table: settings in addition to ``train``."""

    contrast: Literal["dual", "single"] = option(
        "dual", "dual: an adapter for good answers and one for bad ones; single: one adapter, with an instruction"
    )
    alpha: Annotated[float, Gt(0)] = option(5.0, "how far hidden states move, in differences of good and bad")
    layers: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] | None = option(
        None, "the layers whose outputs move, from 1; null: every second layer in the middle of the model"
    )
    contrast_share: Annotated[float, Gt(0), Lt(1)] = option(
        0.5, "share of the optimizer steps that train the contrast; the others train the policy"
    )
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = option(
        0.2, "assumed share of answers with the wrong instruction", only_with="contrast=single"
    )
    good_instruction: str = option(
        "Answer helpfully, correctly and politely.",
        "stands before a prompt to ask for a good answer",
        only_with="contrast=single",
    )
    bad_instruction: str = option(
        "Answer unhelpfully, wrongly or rudely.",
        "stands before a prompt to ask for a bad answer",
        only_with="contrast=single",
    )
    max_length: Annotated[int, Gt(0)] = option(2048, "maximum tokens of prompt and answer together")
    too_long: Literal["error", "skip"] = option(
        "error", "an answer longer than max_length: stop, or leave it out of its ranking"
    )
    eval_prompts: Annotated[int, Ge(0)] = option(32, "held-out prompts to answer at each evaluation; 0: none")
    response_length: Annotated[int, Gt(0)] = option(128, "maximum tokens of these answers", only_with="eval_prompts")


def less_memory(config: RAHFConfig) -> list[dict[str, Any]]:
    """Shorter sequences, from the mildest."""
    return halvings("max_length", config.max_length, 128, too_long="skip")


def chosen_layers(config: RAHFConfig, number: int) -> list[int]:
    """The layers whose outputs move, of a model with ``number`` layers, in increasing order.

    By default every second one of the middle third: 10, 12, ..., 20 of 32, as in the paper.

    Raises:
        ConfigError: the model has no such layer.
    """
    if config.layers is None:
        return list(range(max(1, round(number * 10 / 32)), max(1, round(number * 20 / 32)) + 1, 2))
    if max(config.layers) > number:
        raise ConfigError(f"rahf.layers: the model has layers 1 to {number}, and no layer {max(config.layers)}")
    return sorted(set(config.layers))


def check(config: RAHFConfig, plan: Plan | None) -> None:
    """Check what can be checked without a model.

    Raises:
        ConfigError: settings contradict each other, or the model has no such layer.
        DataError: no ranking orders its answers.
    """
    if config.contrast == "single" and config.good_instruction == config.bad_instruction:
        raise ConfigError("rahf.good_instruction and rahf.bad_instruction are the same: there is no contrast")
    if plan is None:
        return
    if (steps := plan.config.train.get("max_steps", -1)) > 0:
        contrast_steps(config, steps)
    if plan.limits.layers is not None:
        chosen_layers(config, plan.limits.layers)
    for name, rows in (("training", plan.train_rows), ("held-out", plan.eval_rows)):
        if rows and not any(_is_ordered(located) for located in rows):
            raise DataError(
                f"all {len(rows)} {name} rankings are ties: {rows[0].where} and the others have no better answer"
            )


def _is_ordered(located: Located) -> bool:
    row = located.row
    return isinstance(row, Ranking) and len(set(row.ranks)) > 1


def contrast_steps(config: RAHFConfig, steps: int) -> int:
    """The number of a run's optimizer steps that train the contrast: at least one, and not the last.

    Raises:
        ConfigError: the run has only one step.
    """
    if steps < 2:
        raise ConfigError("rahf needs at least two optimizer steps, one for each phase: set train.max_steps=2 or more")
    return min(max(1, round(steps * config.contrast_share)), steps - 1)


def adapters(config: RAHFConfig) -> Sequence[str]:
    """The roles that train the contrast."""
    return ("good", "bad") if config.contrast == "dual" else ("contrast",)
