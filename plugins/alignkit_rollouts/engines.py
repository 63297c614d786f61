"""The engines ``decode`` and ``generate``: functions of the policy and prompts, to answers, all as token ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignkit import ConfigError, Run, SampledAnswers, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignkit_rollouts.config import BatchConfig, DecodeConfig

Engine = Callable[[Any, list[list[int]]], SampledAnswers]


def decode(config: DecodeConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, run: Run) -> Engine:
    """alignkit's own loop, with log-probabilities; ``generate`` for models that the loop does not support.

    Raises:
        ConfigError: CUDA graphs are asked for without a CUDA device, or a setting does not work with ``train.shard``.
    """
    from alignkit.generation import sample

    graphs = _uses_graphs(config, run)
    return _in_batches(
        config,
        sampling,
        lambda policy, part: sample(
            policy, tokenizer, part, sampling, run.say, cuda_graphs=graphs, merged=config.merge_lora
        ),
    )


def _uses_graphs(config: DecodeConfig, run: Run) -> bool:
    if config.cuda_graphs is False:
        return False
    has_cuda, sharded = run.device.type == "cuda", run.config.train.get("shard") is not None
    if config.cuda_graphs is None:
        return has_cuda and not sharded
    if not has_cuda:
        raise ConfigError(f"rollout.cuda_graphs needs a CUDA device, and this run computes on {run.device.type}")
    if sharded:
        raise ConfigError("rollout.cuda_graphs: train.shard gathers the weights again for each batch. Set it to null")
    return True


def generate(config: BatchConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Engine:
    """Transformers' ``generate`` on left-padded batches."""
    from alignkit.generation import generate

    return _in_batches(config, sampling, lambda policy, part: generate(policy, tokenizer, part, sampling))


def _in_batches(config: BatchConfig, sampling: Sampling, sample: Engine) -> Engine:
    """``sample`` for ``config.batch`` answers at a time. Several batches hold prompts of similar length each."""

    def engine(policy: Any, prompts: list[list[int]]) -> SampledAnswers:
        size = max(1, (config.batch or len(prompts) * sampling.samples) // sampling.samples)
        if size >= len(prompts):
            return sample(policy, prompts)
        order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), prompts[number]))
        parts = [order[start : start + size] for start in range(0, len(prompts), size)]
        sampled = [sample(policy, [prompts[number] for number in part]) for part in parts]
        answers = list(itertools.chain(*sampled))
        logps = list(itertools.chain(*(part.logps or () for part in sampled)))
        place = {number: index * sampling.samples for index, number in enumerate(order)}  # of a prompt's first answer
        back = [place[number] + sample for number in range(len(prompts)) for sample in range(sampling.samples)]
        return SampledAnswers((answers[i] for i in back), [logps[i] for i in back] if logps else None)

    return engine
