"""The hidden states of a model after some of its layers. Layers above the last of these are not computed.

Layers are numbered from 1, as in the ``hidden_states`` that a model of Transformers returns: 0 are the embeddings. The
output of the last layer is taken before the norm that follows it, where Transformers returns it after that norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.models.logit_form import base_of, trunk_of
from alignkit.models.lora_forward import lora_forward


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a language model, inside any wrapper of PEFT and accelerate.

    Raises:
        AlignkitError: the model has no list of as many layers as its config names.
    """
    number = base_of(model).config.get_text_config().num_hidden_layers
    for module in trunk_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise AlignkitError(f"{type(base_of(model)).__name__} has no list of {number} layers: use another model")


def layer_outputs(model: Any, layers: Sequence[int], **inputs: Any) -> Tensor:
    """The outputs of these layers for a batch of R rows and T tokens, [L, R, T, d], with the active adapter.

    ``layers`` are increasing numbers from 1, ``inputs`` those of the model's forward.
    """
    blocks, outputs = decoder_layers(model), list[Tensor]()

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(blocks[layer - 1].register_forward_hook(keep).remove)
        stack.enter_context(_without_layers_above(trunk_of(model), blocks, layers[-1]))
        stack.enter_context(lora_forward(model))
        trunk_of(model)(**inputs)
    return torch.stack(outputs)


@contextlib.contextmanager
def _without_layers_above(trunk: nn.Module, blocks: nn.ModuleList, last: int) -> Iterator[None]:
    """Let a trunk compute its first ``last`` layers only."""
    parent, name = next((p, n) for p in trunk.modules() for n, child in p.named_children() if child is blocks)
    setattr(parent, name, nn.ModuleList(list(blocks)[:last]))
    try:
        yield
    finally:
        setattr(parent, name, blocks)
