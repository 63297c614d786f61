"""Sample answers from a policy, batched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from alignkit.batches import Sampling
from alignkit.data.chat_template import answer_text
from alignkit.runs import base


def sample(
    model: Any, tokenizer: transformers.PreTrainedTokenizerBase, prompts: Sequence[list[int]], how: Sampling
) -> list[list[int]]:
    """``how.samples`` answers to each prompt in turn, as token ids up to and with the one that ends it, if one does.

    All prompts are one batch. Tokens are drawn with torch's global generator.
    """
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id
    said = f"a prompt of {width} tokens and up to {how.max_new_tokens} of its answer"
    base.check_length(model, width + how.max_new_tokens, said, "Sample fewer new tokens, or shorten the prompt")
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    warped = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature else {}
    drawn = how.samples if how.temperature else 1  # greedy answers to one prompt are all the same
    config = transformers.GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=how.temperature > 0,
        num_return_sequences=drawn,
        eos_token_id=list(how.stop_ids),
        pad_token_id=pad,
        **warped,
    )
    with torch.no_grad(), nothing_but_what_is_asked(model):
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    answers = [list(_until_stop(row, how.stop_ids)) for row in output[:, width:].tolist()]
    return [answer for answer in answers for _ in range(how.samples // drawn)]


def text(tokenizer: transformers.PreTrainedTokenizerBase, answer: list[int]) -> str:
    """An answer's ids as text, without the token that ends it and what the chat template writes around it.

    An answer of white space alone is empty, as data formats have it.
    """
    said = answer_text(tokenizer, answer)
    return said if said.strip() else ""


@contextlib.contextmanager
def nothing_but_what_is_asked(model: Any) -> Iterator[None]:
    """Without the generation config that came with the model, from which ``generate`` takes what is not asked for.

    A repetition penalty, say, would make answers that the model's log-probabilities do not describe.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> Iterator[int]:
    for token in ids:
        yield token
        if token in stop_ids:
            return
