"""The settings of the stage."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from alignkit import option


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
