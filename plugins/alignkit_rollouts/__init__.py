"""Engines that sample answers: Transformers' batched generation, and its continuous batching."""

from typing import Any

from alignkit import Rollout, hookimpl


def generate(config: Any, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.engines import generate

    return generate(tokenizer, sampling)


def continuous(config: Any, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.engines import continuous

    return continuous(tokenizer, sampling)


@hookimpl
def alignkit_rollout() -> list[Rollout]:
    return [
        Rollout(name="generate", summary="all prompts as one padded batch", build=generate),
        Rollout(name="continuous", summary="continuous batching over a paged cache", build=continuous),
    ]
