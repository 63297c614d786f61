"""The ``sft`` table."""

from dataclasses import dataclass
from typing import Literal

from alignkit import option


@dataclass(frozen=True)
class SFTConfig:
    """What SFT has to set beside ``train``."""

    max_length: int = option(1024, "tokens of prompt and response together")
    too_long: Literal["error", "skip", "cut"] = option("error", "rows over max_length: stop, skip them, or cut the end")
    packing: bool = option(False, "fill each sequence up to max_length with several rows, which do not see each other")
