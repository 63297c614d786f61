"""Log-probabilities and entropies of tokens from last hidden states, with the logits of few positions in memory.

With a frozen head, as under LoRA, the gradient of a log-probability is known in the forward pass already: a row of the
head less the mean of all rows under the softmax. It is kept, [N, d], so that the backward pass costs a multiplication
and the logits are never made again. A head that is trained has its logits made again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.models.logit_form import LogitForm

PLAIN = LogitForm()  # the head's outputs are the logits
LOGITS = 1 << 24  # numbers in memory at a time: 64 MiB in fp32


def token_logps(
    model: Any, hidden: Tensor, targets: Tensor, temperature: float, form: LogitForm = PLAIN
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` [N] and entropies [N] at a temperature, from the last hidden states [N, d].

    ``form`` is how the model's logits follow from its head, as :func:`alignkit.models.logit_form.measure` gives it.
    """
    head = model.get_output_embeddings()
    size = max(1, LOGITS // head.weight.shape[0])
    chunks = [slice(start, start + size) for start in range(0, len(targets), size)]
    if not chunks:
        return hidden.new_zeros(0, dtype=torch.float), hidden.new_zeros(0, dtype=torch.float)
    simple = not any(p.requires_grad for p in head.parameters()) and type(head) is torch.nn.Linear
    parts = []
    for chunk in chunks:
        if simple:
            at = hidden[chunk], head.weight, head.bias, targets[chunk]
            parts.append(_Frozen.apply(*at, temperature, form))  # type: ignore[no-untyped-call]
        else:
            parts.append(
                checkpoint(_through, head, hidden[chunk], targets[chunk], temperature, form, use_reentrant=False)
            )
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropy for _, entropy in parts])


def from_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` [N] and entropies [N] at a temperature, from a model's own logits [N, V]."""
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def _through(head: Any, hidden: Tensor, targets: Tensor, temperature: float, form: LogitForm) -> tuple[Tensor, Tensor]:
    return from_logits(form(head(hidden).float()), targets, temperature)


class _Frozen(torch.autograd.Function):
    """:func:`_through` for a head that is a matrix and is not trained. N positions, width d, vocabulary V."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        form: LogitForm,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logps, slope = _log_softmax(hidden, weight, bias, temperature, form)  # [N, V]
        chosen = logps.gather(-1, targets[:, None]).squeeze(-1)
        p = logps.exp()
        entropy = -(p * logps).sum(-1)
        if ctx.needs_input_grad[0]:
            # d logp(target) / d logits = onehot - p, through the head and what is done to its logits
            p.neg_().scatter_add_(-1, targets[:, None], torch.ones_like(chosen)[:, None])
            ctx.save_for_backward((p.mul_(slope).to(weight.dtype) @ weight).float(), hidden, weight, bias, entropy)
            ctx.how = temperature, form
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, by_logp: Tensor | None, by_entropy: Tensor | None) -> Any:
        direction, hidden, weight, bias, entropy = ctx.saved_tensors
        gradient = torch.zeros_like(direction)
        if by_logp is not None:
            gradient += by_logp[:, None] * direction
        if by_entropy is not None and by_entropy.any():  # seldom: the logits are made again
            logps, slope = _log_softmax(hidden, weight, bias, *ctx.how)
            by_logits = -logps.exp() * (logps + entropy[:, None]) * slope * by_entropy[:, None]
            gradient += (by_logits.to(weight.dtype) @ weight).float()
        return gradient.to(hidden.dtype), None, None, None, None, None


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, form: LogitForm
) -> tuple[Tensor, Any]:
    """Log-probabilities [N, V] in fp32, and the derivative of their logits by the head's own."""
    logits = form(torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float())
    slope: Any = form.scale / temperature
    if form.cap:
        slope = slope * (1 - (logits / form.cap) ** 2)
    return (logits / temperature).log_softmax(-1), slope
