"""The ``rm`` table and those of its losses."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from alignkit import option


@dataclass(frozen=True)
class RMConfig:
    """What reward modelling has to set beside ``train``."""

    max_length: Annotated[int, Gt(0)] = option(2048, "tokens of prompt and answer together")
    too_long: Literal["error", "skip"] = option(
        "error", "an answer over max_length: stop, or leave it out of its ranking"
    )
    shared_prompt: bool | None = option(None, "compute a prompt once for all its answers; null: where that is faster")
    forward_tokens: Annotated[int, Gt(0)] | None = option(
        None,
        "most tokens in one forward; batches over it are split and the loss stays the same; null: no limit",
        resume="may_change",
    )
    normalise_on: Annotated[int, Gt(1)] = option(
        256, "demonstrations on which the score shall have mean 0, deviation 1"
    )


@dataclass(frozen=True)
class BradleyTerryConfig:
    """The ``loss`` table of ``bradley-terry``."""

    margin: bool = option(True, "where the data give margins, a pair must differ by its margin (arXiv 2307.09288)")
    centering: Annotated[float, Ge(0)] = option(
        0.0, "times the mean square of a pair's summed scores is added, to keep scores near 0 (arXiv 2312.09244)"
    )
