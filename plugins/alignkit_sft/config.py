"""The settings of the stage."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt

from alignkit import halvings, option


@dataclass(frozen=True)
class SFTConfig:
    """The ``sft`` table: settings in addition to ``train``."""

    max_length: Annotated[int, Gt(0)] = option(1024, "maximum tokens of prompt and response together")
    too_long: Literal["error", "skip", "cut"] = option(
        "error", "rows longer than max_length: stop, skip them, or truncate them"
    )
    packing: bool = option(
        False, "pack several rows into each sequence of max_length; they do not attend to each other"
    )


def less_memory(config: SFTConfig) -> list[dict[str, Any]]:
    """Shorter sequences, from the mildest."""
    too_long = "skip" if config.too_long == "error" else config.too_long
    return halvings("max_length", config.max_length, 128, too_long=too_long)
