"""Sample answers by a plain loop over the model and its cache: what ``generate`` does, and less of it.

Three things make it faster. The draw takes one uniform number a row, where ``torch.multinomial`` draws one for every
entry of the vocabulary. Rows that have ended leave the batch. A prompt is computed once for all of its answers, and
without the head. Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from alignkit.batches import Sampling
from alignkit.generation.sampling import nothing_but_what_is_asked

LEAVE = 0.25  # ended rows leave the batch when they are this share of it: leaving copies the cache


class Decoder:
    """A causal language model with its cache, one token a step. B rows, each as wide as the longest so far."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.forward = inner
        self.trunk = getattr(inner, inner.base_model_prefix)
        self.counts_positions = "position_ids" in inspect.signature(inner.forward).parameters
        self.cache: Any = transformers.DynamicCache(config=inner.config.get_text_config(decoder=True))
        width, device = max(map(len, prompts)), inner.device
        # [B, width]: 1 where there is a token; prompts are padded on the left, with any token
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ids = torch.tensor([[p[0]] * (width - len(p)) + p for p in prompts], device=device)
        if width > 1:
            self.trunk(**self._inputs(ids[:, :-1], self.mask[:, :-1]))
        self.last = ids[:, -1:]  # [B, 1] tokens that are not in the cache yet

    def logits(self) -> Tensor:
        """Logits of the next token, [B, V] in fp32."""
        logits: Tensor = self.forward(**self._inputs(self.last, self.mask)).logits
        return logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        """Go on with ``tokens`` [B]."""
        self.last = tokens[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.last)], dim=1)

    def repeat(self, times: int) -> None:
        """Every row ``times`` in a row."""
        self.cache.batch_repeat_interleave(times)
        self.mask, self.last = (t.repeat_interleave(times, dim=0) for t in (self.mask, self.last))

    def keep(self, rows: Tensor) -> None:
        """Only these rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.last = self.mask[rows], self.last[rows]

    def _inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        if self.counts_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return inputs


@torch.no_grad()
def decode(model: Any, prompts: Sequence[list[int]], how: Sampling) -> list[list[int]]:
    """``how.samples`` answers to each prompt in turn, as token ids up to and with the one that ends it, if one does.

    Tokens are drawn with torch's global generator of the model's device.
    """
    decoder = Decoder(model, prompts)
    drawn = how.samples if how.temperature else 1  # greedy answers to one prompt are all the same
    if drawn > 1:
        decoder.repeat(drawn)
    answers: list[list[int]] = [[] for _ in range(len(prompts) * drawn)]
    stops = torch.tensor(how.stop_ids, device=decoder.mask.device)
    rows = torch.arange(len(answers), device=stops.device)  # the answer that each row of the batch is
    going = torch.ones_like(rows, dtype=torch.bool)
    steps: list[tuple[Tensor, Tensor]] = []  # (answers, their next token)
    for step in range(how.max_new_tokens):
        tokens = draw(decoder.logits(), how)
        steps.append((rows[going], tokens[going]))
        going = going & ~torch.isin(tokens, stops)
        left = int(going.sum())
        if not left or step + 1 == how.max_new_tokens:
            break
        decoder.append(tokens)
        if left <= (1 - LEAVE) * len(going):
            chosen = going.nonzero().squeeze(1)
            decoder.keep(chosen)
            rows, going = rows[chosen], going[chosen]
    for of, tokens in steps:
        for number, token in zip(of.tolist(), tokens.tolist(), strict=True):
            answers[number].append(token)
    return [answer for answer in answers for _ in range(how.samples // drawn)]


def draw(logits: Tensor, how: Sampling) -> Tensor:
    """A token for each row of logits [B, V], drawn at ``how.temperature`` from the ``how.top_p`` likeliest; [B].

    The token is where the cumulative distribution first exceeds a uniform number.
    """
    if not how.temperature:
        return logits.argmax(-1)
    p = (logits / how.temperature).softmax(-1)
    order = None
    if how.top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= how.top_p, 0)
    cumulative = p.cumsum(-1, dtype=torch.double)
    total = cumulative[:, -1:]
    uniform = torch.rand(total.shape, dtype=torch.double, device=p.device) * total
    place = torch.searchsorted(cumulative, torch.minimum(uniform, total.nextafter(torch.zeros_like(total))), right=True)
    return (place if order is None else order.gather(1, place)).squeeze(1)


@torch.no_grad()
def same_as_generate(model: Any, prompt: list[int], exact: bool) -> bool:
    """Whether a :class:`Decoder` gives the logits of ``generate`` on this model, to the rounding of fp32 or of 16 bits.

    The model decodes three tokens after ``prompt`` and after its last token alone, so that one row is padded.
    """
    prompts, width = [prompt, prompt[-1:]], len(prompt)
    ids = torch.tensor([prompt, [prompt[0]] * (width - 1) + prompt[-1:]], device=model.device)
    mask = torch.tensor([[1] * width, [0] * (width - 1) + [1]], device=model.device)
    config = transformers.GenerationConfig(
        max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with nothing_but_what_is_asked(model):
        expected = model.generate(ids, attention_mask=mask, generation_config=config)
    try:
        decoder = Decoder(model, prompts)
        decoder.repeat(2)
        decoder.keep(torch.tensor([0, 3], device=model.device))
        for step, logits in enumerate(expected.logits):
            far = (decoder.logits() - logits.float()).abs().max() / (1 + logits.float().abs().max())
            if not far <= (1e-4 if exact else 0.05):
                return False
            decoder.append(expected.sequences[:, width + step])
    except (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError):
        return False  # a model with a state or a cache of its own
    return True


@contextlib.contextmanager
def adapters_in(dtype: torch.dtype, model: Any) -> Iterator[None]:
    """The fp32 adapters of a base in 16 bits in its ``dtype``, for forwards without gradients.

    Under autocast an adapter's weights would be cast at every call. Afterwards the parameters are the former tensors.
    """
    base = {p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    fp32 = [p for p in model.parameters() if p.dtype is torch.float32] if dtype in base else []
    former = [p.data for p in fp32]
    for p in fp32:
        p.data = p.data.to(dtype)
    try:
        with torch.autocast(model.device.type, enabled=False) if fp32 else contextlib.nullcontext():
            yield
    finally:
        for p, data in zip(fp32, former, strict=True):
            p.data = data
