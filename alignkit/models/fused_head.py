"""TRL's fused language-model head, which gives log-probabilities without ever building the logits.

``trl.trainer.add_fused_lm_head`` projects positions through the head in tiles. It knows by the names of config fields
what a model does to its logits, so it is compared with the model's own logits before its first use. Everything here
that leans on TRL's insides is in this module, so that a release of TRL changes one file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import trl.trainer.utils

from alignkit.models import logit_form
from alignkit.models.logit_form import base_of
from alignkit.models.token_logps import from_logits, token_logps

LARGE = 100.0  # logits


def forward(model: Any, inputs: dict[str, Any]) -> Any:
    """``log_probs`` and ``is_top1`` [B, T-1] of next tokens that have a label, and ``label_mask`` of which have one.

    ``model`` must have been given the head by ``trl.trainer.add_fused_lm_head``, as TRL's trainers do; ``inputs`` holds
    ``input_ids`` and ``labels`` [B, T]. A model whose log-probabilities the head gets wrong computes its own logits
    instead.
    """
    if not agrees(model):
        return _from_own_logits(model, inputs)
    return _fused(model, inputs)


@contextlib.contextmanager
def adapter_on_head() -> Iterator[None]:
    """Build TRL's trainers with an adapter on the head too. They refuse one; here such a model uses its own logits."""
    with contextlib.ExitStack() as stack:
        for trainer in ("sft_trainer", "dpo_trainer"):
            stack.enter_context(mock.patch(f"trl.trainer.{trainer}.BaseTunerLayer", ()))
        yield


def agrees(model: Any, say: Callable[[str], None] = lambda line: None) -> bool:
    """Whether TRL's head gives the model's own log-probabilities, to rounding. It is computed once per model.

    ``say`` gets a line if not.

    Raises:
        AlignkitError: the model computes no logits from token ids alone.
    """
    inner = base_of(model)
    known: bool | None = getattr(inner, "_alignkit_fused_head", None)
    if known is None:
        known = inner._alignkit_fused_head = _compare(inner)
        if not known:
            say(
                f"TRL's fused head does not give the log-probabilities of {type(inner).__name__}: the model's whole "
                "logits are used, which is slower and needs more memory"
            )
    return known


def _compare(inner: Any) -> bool:
    """Compare on hidden states that are scaled so that the logits are large, and any scale or cap counts."""
    form, head = logit_form.measure(inner), inner.get_output_embeddings()
    if form is None or hasattr(head, "base_layer"):  # TRL's leaves out an adapter on the head
        return False
    states: list[Any] = []

    def scale(module: Any, args: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden * (LARGE / abs(form.scale) / head(hidden).abs().max())
        states.append(output.last_hidden_state)

    handle = logit_form.trunk_of(inner).register_forward_hook(scale)
    try:
        with logit_form.probing(inner) as row:
            ids = row["input_ids"]
            fused = _fused(inner, {**row, "labels": ids}).log_probs[0]
            own, _ = token_logps(inner, states[0][0, :-1], ids[0, 1:], 1.0, form)
    finally:
        handle.remove()
    rounding = 1e-3 if states[0].dtype is torch.float32 else 2e-2
    return bool((fused - own).abs().max() <= rounding * own.abs().max())


def _fused(model: Any, inputs: dict[str, Any]) -> Any:
    """TRL's. It applies the head where there is a label only where Triton runs.

    It scores every position elsewhere, to keep shapes constant for devices that compile. On a CPU the prompt's and the
    padding's share of the head is 30 % of a step, so here it is applied where there is a label on every device.
    """
    with mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: device.type != "neuron"):
        return model(**inputs, use_cache=False, fused_lm_head=True)


def _from_own_logits(model: Any, inputs: dict[str, Any]) -> Any:
    """The same from the model's own forward, with the logits of all positions in memory."""
    labels = inputs["labels"][:, 1:]
    mask = labels != -100
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    logits = outputs.logits[:, :-1][mask]
    logps, _ = from_logits(logits, labels[mask], 1.0)
    return trl.trainer.utils.FusedCausalLMOutput(
        log_probs=logps.new_zeros(mask.shape).masked_scatter(mask, logps),
        is_top1=mask.new_zeros(mask.shape).masked_scatter(mask, logits.argmax(-1) == labels[mask]),
        label_mask=mask,
        aux_loss=getattr(outputs, "aux_loss", None),
    )
