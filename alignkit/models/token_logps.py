"""Log-probabilities and entropies of tokens from last hidden states, with the logits of few positions in memory.

With a frozen head, as under LoRA, the gradient of a log-probability is known in the forward pass: a row of the head
minus the mean of all rows under the softmax. It is stored, [N, d], so the backward pass is one multiplication and never
recomputes the logits. With a trained head, the backward pass recomputes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.models.logit_form import LogitForm

PLAIN = LogitForm()  # the head's outputs are the logits
LOGITS = 1 << 22  # in memory at a time: 16 MiB in fp32, which malloc keeps for the next ones


def token_logps(
    model: Any, hidden: Tensor, targets: Tensor, temperature: float, form: LogitForm = PLAIN
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` [N] and entropies [N] at a temperature, from the last hidden states [N, d].

    ``form`` is the result of :func:`alignkit.models.logit_form.measure`: how the logits follow from the head.
    """
    head = model.get_output_embeddings()
    most = max(1, logits_at_a_time(hidden.device) // head.weight.shape[0])
    size = math.ceil(len(targets) / max(1, math.ceil(len(targets) / most))) or 1  # even chunks: each reads the head
    chunks = [slice(start, start + size) for start in range(0, len(targets), size)]
    if not chunks:
        return hidden.new_zeros(0, dtype=torch.float), hidden.new_zeros(0, dtype=torch.float)
    frozen = not any(p.requires_grad for p in head.parameters()) and type(head) is torch.nn.Linear
    parts = []
    for chunk in chunks:
        if frozen:
            arguments = hidden[chunk], head.weight, head.bias, targets[chunk], temperature, form
            parts.append(_FrozenHead.apply(*arguments))  # type: ignore[no-untyped-call]
        else:
            parts.append(
                checkpoint(_apply_head, head, hidden[chunk], targets[chunk], temperature, form, use_reentrant=False)
            )
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropy for _, entropy in parts])


def logits_at_a_time(device: torch.device) -> int:
    """The number of logits to hold in memory: ``LOGITS``, or 1/64 of a GPU's memory in fp32 if that is more.

    It depends on the whole memory and not on what is free, so that a resumed run computes the same.
    """
    if device.type != "cuda":
        return LOGITS
    return logits_on(int(torch.cuda.get_device_properties(device).total_memory))


def logits_on(memory: int) -> int:
    """The number of logits to hold in memory on a GPU with ``memory`` bytes."""
    return max(LOGITS, memory // (64 * 4))


def from_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` [N] and entropies [N] at a temperature, from a model's own logits [N, V]."""
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def _apply_head(
    head: Any, hidden: Tensor, targets: Tensor, temperature: float, form: LogitForm
) -> tuple[Tensor, Tensor]:
    return from_logits(form(head(hidden).float()), targets, temperature)


class _FrozenHead(torch.autograd.Function):
    """:func:`_apply_head` for a linear head that is not trained. N positions, hidden size d, vocabulary V."""

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
        entropy = -torch.linalg.vecdot(p, logps)
        if ctx.needs_input_grad[0]:
            # d logp(target) / d logits = onehot - p, then through cap, scale and head
            p.neg_().scatter_add_(-1, targets[:, None], torch.ones_like(chosen)[:, None])
            direction = (_scaled(p, slope).to(weight.dtype) @ weight).float()
            ctx.save_for_backward(direction, hidden, weight, bias, entropy)
            ctx.temperature, ctx.form = temperature, form
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> Any:
        direction, hidden, weight, bias, entropy = ctx.saved_tensors
        gradient = torch.zeros_like(direction)
        if grad_logps is not None:
            gradient += grad_logps[:, None] * direction
        if grad_entropy is not None and grad_entropy.any():  # only with an entropy bonus: recompute the logits
            logps, slope = _log_softmax(hidden, weight, bias, ctx.temperature, ctx.form)
            grad_logits = -logps.exp() * (logps + entropy[:, None]) * slope * grad_entropy[:, None]
            gradient += (grad_logits.to(weight.dtype) @ weight).float()
        return gradient.to(hidden.dtype), None, None, None, None, None


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, form: LogitForm
) -> tuple[Tensor, Any]:
    """Log-probabilities [N, V] in fp32, and the derivative of the scaled logits by the outputs of the head."""
    logits = form(torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float())
    slope: Any = form.scale / temperature
    if form.cap:
        slope = slope * (1 - (logits / form.cap) ** 2)
    return _scaled(logits, 1 / temperature).log_softmax(-1), slope


def _scaled(tensor: Tensor, factor: Any) -> Tensor:
    """``tensor * factor``; without a product, which takes as long as a softmax, if the factor is 1."""
    return tensor if isinstance(factor, float) and factor == 1 else tensor * factor
