"""The settings of the stage and of its loss. TRL calls the weights ``desirable_weight`` and ``undesirable_weight``."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from alignkit import halvings, option


@dataclass(frozen=True)
class KTOConfig:
    """The ``kto`` table: settings in addition to ``train``."""

    max_length: Annotated[int, Gt(0)] = option(2048, "maximum tokens of prompt and answer together")
    too_long: Literal["error", "skip"] = option("error", "an answer longer than max_length: stop, or leave it out")
    precompute_ref_log_probs: bool = option(
        False, "compute the reference log-probabilities once before training, then free the reference model"
    )
    eval_prompts: Annotated[int, Ge(0)] = option(32, "held-out prompts to answer at each evaluation; 0: none")
    response_length: Annotated[int, Gt(0)] = option(128, "maximum tokens of these answers", only_with="eval_prompts")


def less_memory(config: KTOConfig) -> list[dict[str, Any]]:
    """No reference model in memory, then shorter sequences, from the mildest."""
    precomputed = [] if config.precompute_ref_log_probs else [{"precompute_ref_log_probs": True}]
    return [*precomputed, *halvings("max_length", config.max_length, 128, too_long="skip")]


@dataclass(frozen=True)
class KTOLossConfig:
    """The ``loss`` table of ``kto``."""

    beta: Annotated[float, Gt(0)] = option(0.1, "strength of the penalty for moving away from the reference")
    good_weight: Annotated[float, Gt(0)] = option(1.0, "weight of good answers in the loss")
    bad_weight: Annotated[float, Gt(0)] = option(1.0, "weight of bad answers in the loss")
