"""The settings of the engines."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt

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


@dataclass(frozen=True)
class VllmConfig:
    """The ``rollout`` table of ``vllm``."""

    urls: list[str] = option(
        ["http://127.0.0.1:8000"],
        "the addresses of vLLM servers, which share the prompts",
        resume="may_change",
        needs_trust="sends prompts to this server",
    )
    max_logps_difference: Annotated[float, Gt(0)] | None = option(
        None,
        "maximum mean absolute difference between log-probabilities of the servers and the policy, in nats per token; "
        "the run stops above it; null: 0.1, or 0.5 with a quantized base",
    )
    importance_cap: Annotated[float, Gt(1)] | None = option(
        None,
        "cap of importance weights (truncated importance sampling); null: 2 with a quantized base, else no weights",
    )
    concurrency: Annotated[int, Gt(0)] = option(64, "requests at a time to each server", resume="may_change")
    timeout: Annotated[float, Gt(0)] = option(600.0, "seconds to wait for a reply", resume="may_change")
    retry_for: Annotated[float, Ge(0)] = option(
        120.0,
        "seconds in which a request is repeated after a time-out, a lost connection, or status 429 or 5xx",
        resume="may_change",
    )


def less_memory(config: BatchConfig) -> list[dict[str, Any]]:
    """Fewer answers at a time, from the mildest."""
    return halvings("batch", config.batch or 1024, 1)
