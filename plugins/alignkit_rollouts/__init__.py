"""Engines that sample answers: Transformers' batched generation, a loop of our own, and continuous batching."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt

from alignkit import Rollout, Run, hookimpl, option


@dataclass(frozen=True)
class GenerateConfig:
    """The ``rollout`` table of ``generate`` and ``decode``."""

    batch: Annotated[int, Gt(0)] | None = option(
        None, "answers to sample at a time, to save memory; null: all at once", resume="may_change"
    )


def generate(config: GenerateConfig, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.engines import generate

    return generate(config, tokenizer, sampling)


def decode(config: GenerateConfig, tokenizer: Any, sampling: Any, run: Run) -> Any:
    from alignkit_rollouts.engines import decode

    return decode(config, tokenizer, sampling, run)


def continuous(config: Any, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.paged import continuous

    return continuous(tokenizer, sampling)


@hookimpl
def alignkit_rollout() -> list[Rollout]:
    return [
        Rollout(
            name="generate", summary="Transformers' generate, in padded batches", config=GenerateConfig, build=generate
        ),
        Rollout(
            name="decode",
            summary="a plain loop: computes a prompt once for its answers, drops finished answers",
            config=GenerateConfig,
            build=decode,
        ),
        Rollout(name="continuous", summary="Transformers' continuous batching with a paged cache", build=continuous),
    ]
