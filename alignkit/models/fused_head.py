"""Log-probabilities of labeled tokens from a language model, without ever building the logits of all positions.

:func:`install_fused_head` gives a model a second way to be called, ``model(..., labels=labels, return_logps=True)``,
which DDP, PEFT and autocast see as an ordinary forward. It runs the trunk and applies the head to labeled positions,
in tiles, with TRL's kernel. A model whose :mod:`~alignkit.models.logit_form` is unknown computes all its logits.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction

from alignkit.errors import PluginError
from alignkit.models import logit_form, transformers_internals
from alignkit.models.logit_form import LogitForm, base_of
from alignkit.models.token_logps import from_logits

VOCABULARY_TILE = 32768  # columns of the head that are multiplied at a time, as in TRL's trainers


@dataclass
class TokenLogpsOutput(ModelOutput):
    """Next-token log-probabilities of a batch of T tokens per row; all tensors are 0 where there is no label."""

    log_probs: Tensor  # [B, T-1]
    is_top1: Tensor = None  # type: ignore[assignment]  # [B, T-1] bool: the label is the likeliest token
    label_mask: Tensor = None  # type: ignore[assignment]  # [B, T-1] bool: there is a label
    aux_loss: Tensor | None = None  # load balancing of experts, if called with output_router_logits=True


def install_fused_head(model: Any) -> None:
    """Let ``model`` be called with ``return_logps=True``. All other calls go to its own forward.

    Call it before a trainer or accelerate wraps the model.
    """
    inner = base_of(model)
    if hasattr(inner, "_alignkit_forward"):
        return

    @functools.wraps(type(inner).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, return_logps: bool = False, **kwargs: Any) -> Any:
        return _token_logps(self, **kwargs) if return_logps else self._alignkit_forward(*args, **kwargs)

    inner._alignkit_forward = inner.forward
    inner.forward = types.MethodType(forward, inner)


def fused_logps(model: Any, inputs: dict[str, Any]) -> TokenLogpsOutput:
    """Log-probabilities of the labeled tokens; ``inputs`` holds ``input_ids`` and ``labels`` [B, T].

    ``model`` may be wrapped by PEFT and accelerate.

    Raises:
        PluginError: :func:`install_fused_head` was not called on it.
    """
    if not hasattr(base_of(model), "_alignkit_forward"):
        raise PluginError("the trainer calls fused_logps on a model without install_fused_head(model). Tell its author")
    uses_fused_head(model)
    output: TokenLogpsOutput = model(**inputs, use_cache=False, return_logps=True)
    return output


def uses_fused_head(model: Any, say: Callable[[str], None] = lambda line: None) -> bool:
    """Whether the model's log-probabilities come from TRL's kernel. The model is measured once.

    If not, ``say`` is called with a line for the user.

    Raises:
        AlignkitError: the model computes no logits from token ids alone, or a token's logits depend on later tokens.
    """
    inner = base_of(model)
    if not hasattr(inner, "_alignkit_form"):
        inner._alignkit_form = logit_form.measure(inner) if _is_linear(inner.get_output_embeddings()) else None
        if inner._alignkit_form is None:
            say(
                f"{type(inner).__name__}: log-probabilities are computed from full logits, which is slower and needs "
                "more memory, because they do not follow from a plain head with a scale and a cap"
            )
    return inner._alignkit_form is not None


def copy_form(model: Any, reference: Any) -> None:
    """Let ``reference``, a copy of ``model`` whose weights cannot be read, compute as ``model`` was measured to do."""
    if hasattr(base_of(model), "_alignkit_form"):
        base_of(reference)._alignkit_form = base_of(model)._alignkit_form


def _is_linear(head: Any) -> bool:
    """Whether a head computes ``weight @ hidden + bias`` and nothing else: no adapter, no hook, no other layer."""
    if type(head) is not torch.nn.Linear:
        return False
    with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        rows = head.weight[:8]
        return torch.equal(head(rows), torch.nn.functional.linear(rows, head.weight, head.bias))


def _token_logps(inner: Any, labels: Tensor, **inputs: Any) -> TokenLogpsOutput:
    form: LogitForm | None = inner._alignkit_form
    targets = labels[:, 1:]
    mask = targets != -100
    aux_loss = None
    if form is None:
        outputs = inner._alignkit_forward(**inputs)
        logits = outputs.logits[:, :-1][mask]
        logps, _ = from_logits(logits, targets[mask], 1.0)
        is_top1 = logits.argmax(-1) == targets[mask]
        aux_loss = getattr(outputs, "aux_loss", None)
    else:
        outputs, head = logit_form.trunk_of(inner)(**inputs), inner.get_output_embeddings()
        logps, _, _, _, is_top1 = ChunkedLogProbFunction.apply(  # type: ignore[no-untyped-call]
            outputs.last_hidden_state[:, :-1][mask],
            head.weight,
            head.bias,
            targets[mask],
            1.0,  # the temperature
            VOCABULARY_TILE,
            form.cap,
            form.scale,
            ("is_top1",),
        )
        if inputs.get("output_router_logits"):
            aux_loss = transformers_internals.load_balancing_loss(inner, outputs, inputs.get("attention_mask"))
    return TokenLogpsOutput(
        log_probs=logps.new_zeros(mask.shape).masked_scatter(mask, logps),
        is_top1=mask.new_zeros(mask.shape).masked_scatter(mask, is_top1),
        label_mask=mask,
        aux_loss=aux_loss,
    )
