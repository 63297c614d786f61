"""How a language model's logits follow from the hidden states of its trunk, measured on the model itself.

``lm_head(hidden)`` is not always the logits. Cohere and Granite scale them, Gemma 2 caps them, and the field of the
config that says so has another name in each family. So it is measured once per model, and verified against the model's
own logits. Where they follow from the head in another way, log-probabilities take the model's own logits instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, one_line
from alignkit.models.transformers_internals import forward_without_autocast

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 8  # tokens of the row that is measured
# largest outputs of the head: so small that no cap acts, as in trained models, so large that any cap acts
LINEAR, TYPICAL, SATURATED = 0.01, 20.0, 1e3


@dataclass(frozen=True)
class LogitForm:
    """``cap * tanh(scale * head(hidden) / cap)``, or without a cap ``scale * head(hidden)``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, outputs: Tensor) -> Tensor:
        """Logits from what the head gives, both [N, V]."""
        logits = outputs * self.scale
        return (logits / self.cap).tanh() * self.cap if self.cap else logits


def base_of(model: Any) -> Any:
    """The Transformers model inside of PEFT's and accelerate's wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: Any) -> Any:
    """The model without its head. Its output has ``last_hidden_state``.

    Raises:
        AlignkitError: this architecture has none under the name that it gives.
    """
    inner = base_of(model)
    trunk = getattr(inner, inner.base_model_prefix, None)
    if trunk is None:
        raise AlignkitError(f"{type(inner).__name__} has no base model to put a scalar head on: use another model")
    return trunk


def measure(model: Any) -> LogitForm | None:
    """Return how the model's logits follow from its trunk; None if only the model's own forward gives them.

    Runs a row of eight tokens a few times, in evaluation mode, and leaves random numbers and modes as they were.

    Raises:
        AlignkitError: the model computes no logits from token ids alone, or a token's logits depend on later tokens.
    """
    import torch

    inner = base_of(model)
    trunk, head = getattr(inner, inner.base_model_prefix, None), inner.get_output_embeddings()
    forward = forward_without_autocast(inner)
    rounding = 1e-4 if inner.dtype is torch.float32 else 2e-2
    with probing(inner) as row:
        own, called = _own_logits(inner, head, row)
        ids = row["input_ids"].clone()
        ids[:, -1] = 0
        before, _ = _own_logits(inner, None, {**row, "input_ids": ids})
        if (own - before)[:, :-1].abs().max() > rounding * own.abs().max():
            raise AlignkitError(
                f"{type(inner).__name__} is not causal: the logits of a token depend on later tokens. Use a "
                "decoder-only model, or set is_decoder in its config"
            )
        if trunk is None or len(called) != 1 or called[0].shape != own.shape:
            return None
        hidden = getattr(trunk(**row, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
            return None
        outputs = head(hidden)
        largest = float(outputs.abs().max()) or 1.0

        def at(size: float) -> tuple[Tensor, Tensor]:
            """The logits and the head's outputs, from hidden states scaled so that the largest output is ``size``."""
            with scaled(head, size / largest) as given:
                logits = forward(**row, use_cache=False).logits
            return logits.double(), given[0].double()

        form = _fitted(at, inner.config)
        pairs = (own.double(), outputs.double()), at(TYPICAL / abs(form.scale))
        agrees = ((form(outputs) - logits).abs().max() <= rounding * logits.abs().max() for logits, outputs in pairs)
        return form if all(agrees) else None


def _own_logits(inner: Any, head: Any, row: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The model's own logits, and what its head gave meanwhile, once per call."""
    forward = forward_without_autocast(inner)
    try:
        if head is None:
            return forward(**row, use_cache=False).logits, []
        with scaled(head, 1.0) as called:
            return forward(**row, use_cache=False).logits, called
    except Exception as error:
        raise AlignkitError(
            f"{type(inner).__name__} gives no log-probabilities of text alone: {one_line(error)}"
        ) from error


def _fitted(at: Callable[[float], tuple[Tensor, Tensor]], config: Any) -> LogitForm:
    """The scale, where outputs are so small that no cap acts, and the cap, where they are so large that any does."""
    logits, outputs = at(LINEAR)
    scale = _in_config(config, float((logits * outputs).sum() / outputs.square().sum()))
    logits, outputs = at(SATURATED / abs(scale))
    bound = float(logits.abs().max())
    capped = bound < abs(scale) * float(outputs.abs().max()) / 2
    return LogitForm(scale, _in_config(config, bound) if capped else None)


def _in_config(config: Any, measured: float) -> float:
    """The number in the config, or its inverse, that a measured one is to rounding; else the measured one."""
    fields = config.to_dict() | config.get_text_config().to_dict()
    numbers = [float(value) for value in fields.values() if isinstance(value, int | float) and value]
    nearest = min([1.0, *numbers, *(1 / number for number in numbers)], key=lambda number: abs(number - measured))
    return nearest if abs(nearest - measured) <= 1e-2 * abs(measured) else measured


@contextlib.contextmanager
def probing(inner: Any) -> Iterator[dict[str, Tensor]]:
    """A short row of tokens as a model's inputs; meanwhile there are no gradients, no dropout and no autocast.

    Modes and random numbers are as before afterwards.
    """
    import torch

    modes = {module: module.training for module in inner.modules()}
    ids = torch.arange(1, LENGTH + 1, device=inner.device)[None] % inner.get_input_embeddings().weight.shape[0]
    devices = [inner.device] if inner.device.type == "cuda" else []
    with torch.no_grad(), torch.autocast(inner.device.type, enabled=False), torch.random.fork_rng(devices):
        inner.eval()
        try:
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        finally:
            for module, training in modes.items():
                module.training = training


@contextlib.contextmanager
def scaled(head: Any, factor: float) -> Iterator[list[Tensor]]:
    """Multiply what a head is given by a factor. Gives the list of what it gives for that."""
    given: list[Tensor] = []
    handles = (
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor, *inputs[1:])),
        head.register_forward_hook(lambda module, inputs, output: given.append(output)),
    )
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()
