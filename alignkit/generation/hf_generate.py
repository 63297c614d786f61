"""Sample answers with Transformers' ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from alignkit.batches import SampledAnswers, Sampling
from alignkit.errors import AlignkitError
from alignkit.generation.decode import NOT_FINITE
from alignkit.models import logit_form


def generate(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    streamer: Any = None,
) -> SampledAnswers:
    """Sample ``sampling.samples`` answers to each prompt in turn, as token ids up to and including a stop token.

    All prompts are one batch; there are no log-probabilities. Tokens are drawn with torch's global generator of the
    model's device. ``streamer`` gets the tokens of a single answer.

    Raises:
        AlignkitError: logits are NaN or infinite.
    """
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    samples = sampling.samples if sampling.temperature else 1  # greedy answers to one prompt are all the same
    config = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        num_return_sequences=samples,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=pad,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}),
    )
    with torch.no_grad(), without_generation_config(model):
        output = model.generate(
            ids, attention_mask=mask, generation_config=config, streamer=streamer, logits_processor=[check_finite]
        )
    answers = [list(_until_stop(row, sampling.stop_ids)) for row in output[:, width:].tolist()]
    return SampledAnswers(answer for answer in answers for _ in range(sampling.samples // samples))


@contextlib.contextmanager
def without_generation_config(model: Any) -> Iterator[None]:
    """Set aside the model's own generation config, from which ``generate`` takes all settings that are not passed.

    A repetition penalty, for example, gives answers that the model's log-probabilities do not describe.
    """
    inner = logit_form.base_of(model)
    own, inner.generation_config = inner.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def check_finite(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Pass on logits [B, V]. The largest must be finite; others may be minus infinity."""
    if not logits.amax(-1).isfinite().all():
        raise AlignkitError(NOT_FINITE)
    return logits


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> Iterator[int]:
    for token in ids:
        yield token
        if token in stop_ids:
            return
