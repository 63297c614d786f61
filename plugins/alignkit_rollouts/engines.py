"""The engines: functions of the policy and of prompts as token ids, to answers as token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignkit import Run, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignkit_rollouts import GenerateConfig

Engine = Callable[[Any, list[list[int]]], list[list[int]]]


def generate(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Engine:
    """``model.generate`` on left-padded batches: fastest where answers are about equally long."""
    from alignkit.generation.sampling import sample

    def engine(policy: Any, prompts: list[list[int]]) -> list[list[int]]:
        size = max(1, (config.batch or len(prompts) * sampling.samples) // sampling.samples)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [answer for part in parts for answer in sample(policy, tokenizer, part, sampling)]

    return engine


def decode(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, run: Run) -> Engine:
    """A loop of our own where it agrees with ``generate`` on the model at hand, else ``generate``."""
    from alignkit.generation.decode import adapters_in, same_as_generate
    from alignkit.generation.decode import decode as answers_of
    from alignkit.generation.sampling import sample

    agrees: list[bool] = []  # found out at the first call

    def engine(policy: Any, prompts: list[list[int]]) -> list[list[int]]:
        if not agrees:
            agrees.append(same_as_generate(policy, prompts[0], exact=run.dtype.itemsize == 4))
            if not agrees[0]:
                run.say("rollout 'decode' cannot decode this model, which has a cache of its own: using generate")
        answers: dict[int, list[list[int]]] = {}
        for part in _batches(config, prompts, sampling):
            if agrees[0]:
                with adapters_in(run.dtype, policy):
                    given = answers_of(policy, [prompts[i] for i in part], sampling)
            else:
                given = sample(policy, tokenizer, [prompts[i] for i in part], sampling)
            for place, number in enumerate(part):
                answers[number] = given[place * sampling.samples : (place + 1) * sampling.samples]
        return [answer for number in range(len(prompts)) for answer in answers[number]]

    return engine


def _batches(config: GenerateConfig, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The numbers of the prompts of each batch; several batches hold prompts of about one length."""
    size = max(1, (config.batch or len(prompts) * sampling.samples) // sampling.samples)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if size < len(prompts) else range(len(prompts))
    return [list(order[start : start + size]) for start in range(0, len(prompts), size)]
