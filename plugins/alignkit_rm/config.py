"""The settings of the stage and of its losses."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from alignkit import halvings, option


@dataclass(frozen=True)
class RMConfig:
    """The ``rm`` table: settings in addition to ``train``."""

    max_length: Annotated[int, Gt(0)] = option(2048, "maximum tokens of prompt and answer together")
    too_long: Literal["error", "skip"] = option(
        "error", "an answer longer than max_length: stop, or leave it out of its ranking"
    )
    shared_prompt: bool | None = option(
        None, "compute a prompt once for all its answers; null: if that is supported and faster"
    )
    forward_tokens: Annotated[int, Gt(0)] | None = option(
        None,
        "maximum tokens per forward pass; larger batches are split, with the same loss; null: no limit",
        resume="may_change",
    )
    normalise_on: Annotated[int, Gt(1)] = option(
        256, "number of demonstrations on which the score is normalized to mean 0, standard deviation 1"
    )


def less_memory(config: RMConfig) -> list[dict[str, Any]]:
    """Fewer tokens per forward pass, then shorter sequences, from the mildest."""
    passes = halvings("forward_tokens", config.forward_tokens or 32768, 256)
    return [*passes, *halvings("max_length", config.max_length, 128, too_long="skip")]


@dataclass(frozen=True)
class BradleyTerryConfig:
    """The ``loss`` table of ``bradley-terry``."""

    margin: bool = option(True, "use the margins of the data, if they have any (arXiv 2307.09288)")
    centering: Annotated[float, Ge(0)] = option(
        0.0, "weight of the squared sum of a pair's scores, which keeps scores close to 0 (arXiv 2312.09244)"
    )
