"""Transformers' continuous batching, ``model.generate_batch``, in the dtype and with the attention of the run.

It generates in another thread, outside of the autocast context of the training loop, and may switch to another
attention kernel. With some layers, such as 4-bit ones, its ragged batches give wrong answers. So before the first
prompts are answered, greedy answers are compared with the model's own forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from alignkit import AlignkitError, Sampling
from alignkit.models import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAGE = 256  # tokens of a page of the cache
BATCH_TOKENS = 2048  # maximum tokens of a forward pass
CHECKED = 8  # tokens of the answer that is checked


def continuous(tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Callable[[Any, list[list[int]]], Any]:
    """The engine: the next prompt starts as soon as an answer is finished.

    Its cache has room for all answers at their maximum length. Transformers' default is nine tenths of the free memory.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}),
    )
    checked: list[bool] = []

    def engine(policy: Any, prompts: list[list[int]]) -> list[list[int]]:
        if not checked:
            check(policy, prompts[:2], tokenizer.pad_token_id)
            checked.append(True)
        repeated = [prompt for prompt in prompts for _ in range(sampling.samples)]
        seed = int(torch.randint(2**31, ()))  # from torch's generator, which the stage has seeded
        return answers_of(policy, repeated, config, seed)

    return engine


def answers_of(policy: Any, prompts: list[list[int]], config: Any, seed: int) -> list[list[int]]:
    """An answer to each prompt, in the dtype and with the attention of the caller's forward pass."""
    from transformers import ContinuousBatchingConfig

    blocks = sum(1 + (len(prompt) + config.max_new_tokens) // PAGE for prompt in prompts)
    room = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=blocks + 1,
        max_batch_tokens=max(len(prompts), min(BATCH_TOKENS, sum(map(len, prompts)))),
        seed=seed,
        auto_switch_to_flash=False,
    )
    with _autocast_in_every_thread(policy):
        outputs = policy.generate_batch(prompts, config, room, progress_bar=False)
    in_order = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[1]))
    return [list(output.generated_tokens) for output in in_order]


def check(policy: Any, prompts: list[list[int]], pad: int) -> None:
    """Compare greedy answers to a few prompts with the most likely tokens of the model's own forward pass.

    Raises:
        AlignkitError: a token is much less likely than the most likely one; or weights are in fp32 under autocast,
            since the cache always has the dtype of the weights.
    """
    import torch
    from transformers import GenerationConfig

    inner = base_of(policy)
    kind = inner.device.type
    if torch.is_autocast_enabled(kind) and inner.dtype is not torch.get_autocast_dtype(kind):
        wanted, weights = (str(d).removeprefix("torch.") for d in (torch.get_autocast_dtype(kind), inner.dtype))
        raise AlignkitError(
            f"rollout 'continuous' cannot compute in {wanted} with weights in {weights}: set rollout.name=decode"
        )
    greedy = GenerationConfig(max_new_tokens=CHECKED, do_sample=False, eos_token_id=-1, pad_token_id=pad)
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers_of(policy, prompts, greedy, seed=0), strict=True):
            ids = torch.tensor([prompt + answer], device=inner.device)
            logits = policy(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            best = logits.max(-1).values
            short = best - logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            if len(answer) != CHECKED or not (short <= 0.1 * (best - logits.mean(-1))).all():  # 0.1: 16-bit rounding
                raise AlignkitError(
                    f"rollout 'continuous' samples wrong answers from {type(inner).__name__}. Set rollout.name=decode"
                )


@contextlib.contextmanager
def _autocast_in_every_thread(policy: Any) -> Iterator[None]:
    """Let the model's forward pass use the autocast context of this thread in every thread."""
    import torch

    inner = base_of(policy)
    kind, forward, own = inner.device.type, inner.forward, vars(inner).get("forward")
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def within(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):  # a CUDA graph keeps no cache
            return forward(*args, **kwargs)

    inner.forward = within
    try:
        yield
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own
