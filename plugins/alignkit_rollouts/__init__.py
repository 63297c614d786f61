"""Engines that sample answers: alignkit's own loop, Transformers' ``generate``, and its continuous batching."""

from typing import Any

from alignkit import Rollout, Run, hookimpl
from alignkit_rollouts.config import BatchConfig, DecodeConfig, less_memory


def generate(config: BatchConfig, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.engines import generate

    return generate(config, tokenizer, sampling)


def decode(config: DecodeConfig, tokenizer: Any, sampling: Any, run: Run) -> Any:
    from alignkit_rollouts.engines import decode

    return decode(config, tokenizer, sampling, run)


def continuous(config: Any, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.paged import continuous

    return continuous(tokenizer, sampling)


@hookimpl
def alignkit_rollout() -> list[Rollout]:
    return [
        Rollout(
            name="decode",
            summary="alignkit's own sampling loop: each prompt is computed once, and finished answers leave the batch",
            config=DecodeConfig,
            build=decode,
            less_memory=less_memory,
        ),
        Rollout(
            name="generate",
            summary="Transformers' generate, in padded batches",
            config=BatchConfig,
            build=generate,
            less_memory=less_memory,
        ),
        Rollout(name="continuous", summary="Transformers' continuous batching with a paged cache", build=continuous),
    ]
