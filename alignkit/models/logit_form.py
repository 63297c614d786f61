"""The function from the hidden states of a trunk to a language model's logits, measured on the model itself.

The logits are not always ``lm_head(hidden)``. Cohere and Granite scale them and Gemma 2 caps them, and each family has
its own config fields for that. So the relation is measured once per model and verified against the model's own logits.
For models with any other relation, log-probabilities are computed from the model's own logits.
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

LENGTH = 8  # tokens of the sequence used for measuring
# largest outputs of the head: so small that no cap matters, as in trained models, and so large that any cap does
LINEAR, TYPICAL, SATURATED = 0.01, 20.0, 1e3


@dataclass(frozen=True)
class LogitForm:
    """``cap * tanh(scale * head(hidden) / cap)``, or without a cap ``scale * head(hidden)``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, outputs: Tensor) -> Tensor:
        """Logits from the outputs of the head, both [N, V]."""
        logits = outputs if self.scale == 1 else outputs * self.scale
        return (logits / self.cap).tanh() * self.cap if self.cap else logits


def base_of(model: Any) -> Any:
    """The Transformers model inside of PEFT's and accelerate's wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: Any) -> Any:
    """The model without its head. Its output has ``last_hidden_state``.

    Raises:
        AlignkitError: the model has no module named by its ``base_model_prefix``.
    """
    inner = base_of(model)
    trunk = getattr(inner, inner.base_model_prefix, None)
    if trunk is None:
        raise AlignkitError(f"{type(inner).__name__} has no trunk under its base_model_prefix: use another model")
    return trunk


def measure(model: Any) -> LogitForm | None:
    """The function from the model's trunk to its logits; None if it is not a head, a scale and a cap.

    This runs a sequence of eight tokens a few times in evaluation mode. Random states and modes are restored.

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
            """Logits and outputs of the head, from hidden states scaled so that the largest output is ``size``."""
            with scaled(head, size / largest) as captured:
                logits = forward(**row, use_cache=False).logits
            return logits.double(), captured[0].double()

        form = _fitted(at, inner.config)
        pairs = (own.double(), outputs.double()), at(TYPICAL / abs(form.scale))
        agrees = ((form(outputs) - logits).abs().max() <= rounding * logits.abs().max() for logits, outputs in pairs)
        return form if all(agrees) else None


def _own_logits(inner: Any, head: Any, row: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The model's own logits, and the outputs of each call of its head."""
    forward = forward_without_autocast(inner)
    try:
        if head is None:
            return forward(**row, use_cache=False).logits, []
        with scaled(head, 1.0) as called:
            return forward(**row, use_cache=False).logits, called
    except Exception as error:
        raise AlignkitError(
            f"{type(inner).__name__} cannot compute logits from token ids alone: {one_line(error)}"
        ) from error


def _fitted(at: Callable[[float], tuple[Tensor, Tensor]], config: Any) -> LogitForm:
    """Measure the scale on outputs so small that no cap matters, and the cap on outputs so large that any cap does."""
    logits, outputs = at(LINEAR)
    scale = _in_config(config, float((logits * outputs).sum() / outputs.square().sum()))
    logits, outputs = at(SATURATED / abs(scale))
    bound = float(logits.abs().max())
    capped = bound < abs(scale) * float(outputs.abs().max()) / 2
    return LogitForm(scale, _in_config(config, bound) if capped else None)


def _in_config(config: Any, measured: float) -> float:
    """The number in the config, or its inverse, that equals a measured one up to rounding; else the measured one."""
    fields = config.to_dict() | config.get_text_config().to_dict()
    numbers = [float(value) for value in fields.values() if isinstance(value, int | float) and value]
    nearest = min([1.0, *numbers, *(1 / number for number in numbers)], key=lambda number: abs(number - measured))
    return nearest if abs(nearest - measured) <= 1e-2 * abs(measured) else measured


@contextlib.contextmanager
def probing(inner: Any) -> Iterator[dict[str, Tensor]]:
    """Yield a short token sequence as inputs of a model, without gradients, dropout and autocast meanwhile.

    Modes and random states are restored afterwards.
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
    """Multiply the inputs of a head by a factor, and yield the list of its outputs."""
    captured: list[Tensor] = []
    handles = (
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor, *inputs[1:])),
        head.register_forward_hook(lambda module, inputs, output: captured.append(output)),
    )
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
