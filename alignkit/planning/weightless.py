"""Models built from their configs, where a run would load weights from files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.config.model_kwargs import OPTIONS, REFUSED
from alignkit.errors import AlignkitError, ConfigError, one_line
from alignkit.models import adapters, copy_adapter, pretrained
from alignkit.planning.replaced import replaced
from alignkit.runs import base

BLOCK = 64  # weights that share a constant in NF4
CONSTANTS = 256  # of these that share one, with double quantization
TABLES = 4 * 16, 4 * (16 + 256 + 1)  # bytes: the values of 4 bits; with those of 8 bits and an offset


@contextlib.contextmanager
def without_weights(planned: Mapping[str, str]) -> Iterator[None]:
    """Build models in this context from their configs instead of loading them.

    ``planned`` maps the folder of a run that does not exist yet to the base that it will have. Its adapter has the
    shape of the adapter beside which it is loaded.
    """
    load_adapter, continue_adapter, open_run = adapters.load_adapter, adapters.continue_adapter, adapters.open_run

    def load(located: str, kwargs: dict[str, Any], head: bool = False) -> Any:
        return build(planned.get(located, located), kwargs, head)

    def load_planned(model: Any, folder: Path, name: str, trained: bool) -> Tensor | None:
        if str(folder) not in planned:
            return load_adapter(model, folder, name, trained)
        copy_adapter(model, "default", name, trained)
        return torch.zeros(1, model.get_input_embeddings().weight.shape[1])

    def continue_planned(model: nn.Module, folder: Path) -> nn.Module:
        return model if str(folder) in planned else continue_adapter(model, folder)

    def open_planned(folder: Path, record: dict[str, Any], dtype: Any = None) -> nn.Module:
        if str(folder) not in planned:
            return open_run(folder, record, dtype)
        model: nn.Module = build(planned[str(folder)], {"dtype": dtype}, record["role"] in adapters.WITH_HEAD)
        return model.eval()

    of_adapters = {"load_adapter": load_planned, "continue_adapter": continue_planned, "open_run": open_planned}
    random = dict.fromkeys(("kaiming_uniform_", "uniform_"), lambda tensor, *_, **__: tensor)  # never read
    with replaced(pretrained, load=load), replaced(adapters, **of_adapters), replaced(nn.init, **random):
        yield


def build(located: str, kwargs: Mapping[str, Any], head: bool = False) -> Any:
    """The model that :func:`alignkit.models.pretrained.load` would load, with new weights.

    Raises:
        AlignkitError: there is no config, or no model for it.
        ConfigError: it is quantized in another way than to 4 bits by bitsandbytes.
    """
    options = {"trust_remote_code": False, **base.of_repository(kwargs)}
    attributes = {name: value for name, value in kwargs.items() if name not in (*OPTIONS, *REFUSED)}
    try:
        config = AutoConfig.from_pretrained(located, **({"num_labels": 1} if head else {}), **options, **attributes)
        quantization = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        if quantization is not None:
            config.quantization_config = None
        dtype = kwargs["dtype"]
        arguments = {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
        if "attn_implementation" in kwargs:
            arguments["attn_implementation"] = kwargs["attn_implementation"]
        auto = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        model = auto.from_config(config, **arguments, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise AlignkitError(f"the model {located} could not be built from its config: {one_line(error)}") from error
    if quantization is not None:
        quantize(model, quantization, located)
    if hasattr(model, "score"):
        model.score.float()
    return model


def quantize(model: nn.Module, quantization: Any, located: str) -> None:
    """Put the linear layers of a model, without its head, into 4 bits."""
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if not settings.get("load_in_4bit"):
        raise ConfigError(
            f"{located}: plan supports only 4-bit weights of bitsandbytes, and this model is quantized in another way "
            f"({settings.get('quant_method')})"
        )
    heads = ("lm_head", "embed_out", "score")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in heads:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Linear4bit(module, bool(settings["bnb_4bit_use_double_quant"])))


def nf4_bytes(weights: int, double: bool = True) -> int:
    """The bytes of ``weights`` in NF4: 4 bits each, and 32 for each block, or with double quantization 8 for each block

    and 32 for 256 blocks.
    """
    blocks = -(-weights // BLOCK)
    constants = blocks + 4 * -(-blocks // CONSTANTS) if double else 4 * blocks
    return -(-weights // 2) + constants + TABLES[double]


class Linear4bit(nn.Linear):
    """A frozen linear layer that takes the memory of bitsandbytes' ``Linear4bit``, and as much as that in its steps."""

    def __init__(self, layer: nn.Linear, double: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        packed = torch.zeros(nf4_bytes(layer.weight.numel(), double), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.compute_dtype = layer.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        result: Tensor = _Product.apply(x.to(self.compute_dtype), shape, self.bias)  # type: ignore[no-untyped-call]
        return result.to(x.dtype)


class _Product(torch.autograd.Function):
    """The product with a weight that exists, unpacked, during the operation only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return functional.linear(x, _unpacked(x, shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ _unpacked(gradient, ctx.shape), None, None


def _unpacked(like: Tensor, shape: tuple[int, int]) -> Tensor:
    like.new_zeros(-(-shape[0] * shape[1] // BLOCK), dtype=torch.float32)  # the constants, first
    return like.new_zeros(shape)
