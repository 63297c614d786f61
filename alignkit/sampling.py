"""Sample answers from a policy, batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers


def sample(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    samples: int,
    stop_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[list[list[int]]]:
    """``samples`` answers to each prompt, as token ids up to and with the token that ends it, where there is one.

    All prompts are one batch. Temperature 0 is greedy; otherwise tokens are drawn with torch's global generator.
    """
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_return_sequences=samples,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        **drawn,
    )
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    answers = [list(_until_stop(row, stop_ids)) for row in output[:, width:].tolist()]
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def text(tokenizer: transformers.PreTrainedTokenizerBase, answer: list[int]) -> str:
    """An answer's ids as text, without the token that ends it."""
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> Iterator[int]:
    for token in ids:
        yield token
        if token in stop_ids:
            return
