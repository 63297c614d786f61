"""Sample answers by a plain loop over a model and its key-value cache.

It samples from the same distribution as Transformers' ``generate``, in less time: each distinct prompt is computed
once for all of its answers, finished answers leave the batch, a token needs one random number instead of one for each
entry of the vocabulary, and LoRA adapters are cast once. Importing this module imports torch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from alignkit.batches import SampledAnswers, Sampling
from alignkit.errors import AlignkitError
from alignkit.generation import step_graph
from alignkit.generation.cache import cache_of
from alignkit.models import logit_form
from alignkit.models.device_and_dtype import compute_dtype
from alignkit.models.lora_forward import lora_forward, merged_lora

LEAVE = 0.125  # the share of a batch that has to be finished before it leaves: that copies the cache of the others
LEAVE_GRAPH = 0.5  # the same with graphs: each number of rows is another graph
BLOCK = 256  # entries of the vocabulary
NOT_FINITE = "the model's logits are NaN or infinite, so it cannot be sampled from. If it runs in float16, try bfloat16"


class Decoder:
    """A causal language model and its cache, for B rows; ``length`` is the maximum of tokens in a row.

    With ``graphs``, each step is a :class:`step_graph.StepGraph`.

    Raises:
        NotImplementedError: the model cannot be decoded so.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], length: int, graphs: bool = False) -> None:
        self.model = logit_form.base_of(model)
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self.cache: Any = cache_of(self.model.config, length)
        self.graphs = graphs
        self.graph: step_graph.StepGraph | None = None
        if graphs and not (self.takes_positions and step_graph.is_possible(self.model, self.cache)):
            raise NotImplementedError("its shapes or its attention do not allow them")
        width, device = max(map(len, prompts)), self.model.device
        # [B, width], 1 where there is a token; prompts are padded on the left, with any token
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ids = torch.tensor([[p[0]] * (width - len(p)) + p for p in prompts], device=device)
        if width > 1:  # without the head
            logit_form.trunk_of(model)(**self._inputs(ids[:, :-1], self.mask[:, :-1]))
        self.last = ids[:, -1:]  # [B, 1] tokens that are not in the cache yet

    def logits(self) -> Tensor:
        """The logits of the next token, [B, V] in fp32."""
        if self.graphs and self.graph is None and self.cache.get_seq_length():
            self.graph = step_graph.StepGraph(self.model, self.cache, self.mask, self.last)
        logits = self.graph.logits() if self.graph else self.model(**self._inputs(self.last, self.mask)).logits
        return logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        """Append one token to each row, [B]."""
        self.last = tokens[:, None]
        if self.graph:
            self.graph.append(tokens)
        self.mask = torch.cat([self.mask, torch.ones_like(self.last)], dim=1)

    def select(self, rows: Tensor) -> None:
        """Continue with these rows; a row can be selected more than once."""
        if self.graph:
            self.graph.release(self.mask.shape[1] - 1)
            self.graph = None
        self.cache.reorder_cache(rows)
        self.mask, self.last = (tensor.index_select(0, rows) for tensor in (self.mask, self.last))

    def _inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        if self.takes_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return inputs


class Step(NamedTuple):
    """The next token of some answers."""

    answers: Tensor  # [n] their indices
    tokens: Tensor  # [n]
    logps: Tensor  # [n]


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    streamer: Any = None,
    graphs: bool = False,
    merged: bool = False,
) -> SampledAnswers:
    """Sample ``sampling.samples`` answers to each prompt in turn, with their log-probabilities.

    An answer is token ids up to and including the stop token, if it has one. ``streamer`` is one of Transformers' and
    gets the tokens of a single answer. With ``graphs``, each step is a CUDA graph, if there is CUDA. With ``merged``,
    LoRA layers are :func:`merged_lora`, and there are no log-probabilities except in fp32: those of the policy differ.
    For random numbers see :func:`steps`.

    Raises:
        AlignkitError: logits are NaN or infinite.
    """
    times = 1 if sampling.temperature else sampling.samples  # greedy answers to one prompt are all the same
    sampling = dataclasses.replace(sampling, samples=sampling.samples // times)
    drawn: list[Step] = []
    if streamer:
        streamer.put(torch.tensor(prompts))
    for step in steps(model, prompts, sampling, graphs, merged):
        drawn.append(step)
        if streamer:
            streamer.put(step.tokens.cpu())
    if streamer:
        streamer.end()
    if torch.cat([step.logps for step in drawn]).isnan().any():
        raise AlignkitError(NOT_FINITE)
    answers: list[list[int]] = [[] for _ in range(len(prompts) * sampling.samples)]
    logps: list[list[float]] = [[] for _ in answers]
    for step in drawn:
        for number, token, logp in zip(*(each.tolist() for each in step), strict=True):
            answers[number].append(token)
            logps[number].append(logp)
    repeated = [number for number in range(len(answers)) for _ in range(times)]
    exact = not merged or compute_dtype(logit_form.base_of(model)) is torch.float32
    logps_of_all = [list(logps[number]) for number in repeated] if exact else None
    return SampledAnswers((list(answers[number]) for number in repeated), logps_of_all)


@torch.no_grad()
def steps(
    model: Any, prompts: Sequence[list[int]], sampling: Sampling, graphs: bool = False, merged: bool = False
) -> Iterator[Step]:
    """The tokens of all answers, position by position.

    The random numbers of all answers are drawn first, from torch's global CPU generator. So those of an answer depend
    on its place, and not on when other answers end or on the device.
    """
    uniform = torch.rand(len(prompts) * sampling.samples, sampling.max_new_tokens, dtype=torch.double)
    distinct = {tuple(prompt): row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    with merged_lora(model) if merged else lora_forward(model):
        length = max(map(len, prompts)) + sampling.max_new_tokens
        decoder = Decoder(model, [list(prompt) for prompt in distinct], length, graphs)
        device = decoder.mask.device
        uniform, stops = uniform.to(device), torch.tensor(sampling.stop_ids, device=device)
        rows = [distinct[tuple(prompt)] for prompt in prompts for _ in range(sampling.samples)]
        if rows != list(range(len(distinct))):
            decoder.select(torch.tensor(rows, device=device))
        answers = torch.arange(len(rows), device=device)  # of each row of the batch
        alive = torch.ones_like(answers, dtype=torch.bool)
        for position in range(sampling.max_new_tokens):
            tokens, logps = draw(decoder.logits(), uniform[answers, position], sampling)
            yield Step(answers[alive], tokens[alive], logps[alive])
            alive = alive & ~torch.isin(tokens, stops)
            left = int(alive.sum())
            if not left or position + 1 == sampling.max_new_tokens:
                return
            decoder.append(tokens)
            if left <= (1 - (LEAVE_GRAPH if graphs else LEAVE)) * len(alive):
                chosen = alive.nonzero().squeeze(1)
                decoder.select(chosen)
                answers, alive = answers[chosen], alive[chosen]


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits [B, V] in fp32: the tokens [B], and their log-probabilities [B].

    ``uniform`` [B] are random numbers in [0, 1), which ``temperature=0`` does not use. Log-probabilities are at
    ``sampling.temperature`` (at 1 if that is 0) over the whole vocabulary, also with ``top_p``.
    """
    scaled = logits / sampling.temperature if sampling.temperature not in (0, 1) else logits
    largest = scaled.amax(-1, keepdim=True)
    weights = (scaled - largest).exp()  # not normalized, [B, V]
    log_total = largest + weights.sum(-1, keepdim=True).log()
    if not sampling.temperature:
        tokens = scaled.argmax(-1, keepdim=True)
    elif sampling.top_p < 1:
        weights, order = weights.sort(-1, descending=True)
        before = weights.cumsum(-1, dtype=torch.double) - weights
        weights = weights.masked_fill(before >= sampling.top_p * weights.sum(-1, keepdim=True), 0)
        tokens = order.gather(1, _inverse(weights, uniform[:, None]))
    else:
        tokens = _inverse(weights, uniform[:, None])
    return tokens.squeeze(1), (scaled.gather(1, tokens) - log_total).squeeze(1)


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index [B, 1] at which the cumulative sum of weights [B, V] exceeds the share ``uniform`` [B, 1] of it.

    The block of the index is found first, so that cumulative sums are short: they are in double precision.
    """
    blocks = functional.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.double)
    target = uniform * ends[:, -1:]
    block = _first_above(ends, target).clamp(max=ends.shape[1] - 1)  # NaN is above all
    inside = blocks.take_along_dim(block[..., None], 1).squeeze(1).cumsum(-1, dtype=torch.double)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0)
    return (block * BLOCK + _first_above(inside, target - start)).clamp(max=weights.shape[1] - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index at which a cumulative sum exceeds ``target``, always one that adds to the sum."""
    last = cumulative[:, -1:]
    below = torch.minimum(target, last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(cumulative, below, right=True)
