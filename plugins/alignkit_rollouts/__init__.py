"""Engines that sample answers: alignkit's loop, Transformers' ``generate`` and continuous batching, and vLLM."""

from pathlib import Path
from typing import Any

from alignkit import Plan, Result, Rollout, Run, hookimpl
from alignkit_rollouts.config import BatchConfig, DecodeConfig, VllmConfig, less_memory


def generate(config: BatchConfig, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.engines import generate

    return generate(config, tokenizer, sampling)


def decode(config: DecodeConfig, tokenizer: Any, sampling: Any, run: Run) -> Any:
    from alignkit_rollouts.engines import decode

    return decode(config, tokenizer, sampling, run)


def continuous(config: Any, tokenizer: Any, sampling: Any) -> Any:
    from alignkit_rollouts.paged import continuous

    return continuous(tokenizer, sampling)


def vllm(config: VllmConfig, tokenizer: Any, sampling: Any, run: Run) -> Any:
    from alignkit_rollouts.vllm_engine import VllmEngine

    return VllmEngine(config, sampling, run)


def check_vllm(config: VllmConfig, plan: Plan | None) -> None:
    from alignkit_rollouts import vllm_check

    vllm_check.check(config, plan)


@hookimpl
def alignkit_run_end(run: Run, result: Result) -> None:
    _remove_adapters(run, result.folder)


@hookimpl
def alignkit_run_failed(run: Run, error: Exception) -> None:
    _remove_adapters(run, run.folder)


def _remove_adapters(run: Run, folder: Path) -> None:
    """Remove the adapters of a run that has ended from its vLLM servers, and from its folder."""
    if run.config.rollout is None or run.config.rollout.component.build is not vllm:
        return
    from alignkit_rollouts.vllm_engine import remove_adapters

    remove_adapters(run, folder)


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
        Rollout(
            name="vllm",
            summary="vLLM servers, which get the policy's adapter in each iteration",
            config=VllmConfig,
            build=vllm,
            check=check_vllm,
            requires=("httpx",),
            in_other_process=True,
        ),
    ]
