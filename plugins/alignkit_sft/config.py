"""The ``sft`` table."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from alignkit import option


@dataclass(frozen=True)
class SFTConfig:
    """What SFT has to set beside ``train``."""

    max_length: Annotated[int, Gt(0)] = option(1024, "tokens of prompt and response together")
    too_long: Literal["error", "skip", "cut"] = option("error", "rows over max_length: stop, skip them, or cut the end")
    packing: bool = option(False, "fill each sequence up to max_length with several rows, which do not see each other")
