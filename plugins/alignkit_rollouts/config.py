"""The settings of the engines."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt

from alignkit import halvings, option


@dataclass(frozen=True)
class BatchConfig:
    """The ``rollout`` table of ``generate``."""

    batch: Annotated[int, Gt(0)] | None = option(
        None, "answers to sample at a time, to save memory; null: all at once", resume="may_change"
    )


@dataclass(frozen=True)
class DecodeConfig(BatchConfig):
    """The ``rollout`` table of ``decode``."""

    cuda_graphs: bool | None = option(
        None,
        "launch each step as a CUDA graph: faster, and attention is over the longest answer; null: on a CUDA device",
    )
    merge_lora: bool = option(
        False,
        "decode with copies of the weights that the LoRA adapter is added to: faster, takes memory, rounds in bf16",
    )


def less_memory(config: BatchConfig) -> list[dict[str, Any]]:
    """Fewer answers at a time, from the mildest."""
    return halvings("batch", config.batch or 1024, 1)
