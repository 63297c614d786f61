"""The model of a run as plain weights: its adapter merged into the base, one layer at a time, and rounded once.

A layer of the base is dequantized, the adapter is added in fp32, and the sum is rounded. (Merging into 4-bit weights
would round to 4 bits again.) The result grows while the base shrinks, so there is no second copy in memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError, one_line
from alignkit.models import adapters, device_and_dtype, memory, pretrained
from alignkit.models.peft_internals import dense_weight, is_quantized, layers_by_base, release_lora
from alignkit.models.transformers_internals import is_transposed
from alignkit.runs import base as bases


def open_stored(folder: Path, record: dict[str, Any]) -> Any:
    """The model of a finished run with its weights as they were in training. ``record`` is its manifest.

    The base of an adapter is in the dtype of the run, or quantized. A full model is as its files have it.
    """
    dtype = "auto" if record["weights"] == "model" else getattr(torch, record["dtype"])
    model: Any = adapters.open_run(folder, record, dtype)
    return model.to(device_and_dtype.run_device({}))


def open_on_original(folder: Path, record: dict[str, Any]) -> Any:
    """Like :func:`open_stored`, on the base as its files have it: not quantized, in their dtype."""
    import peft

    base = _load(bases.of_run(record, folder, print), record)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval().to(device_and_dtype.run_device({}))


def open_plain(folder: Path, record: dict[str, Any]) -> Any:
    """The exported model in ``folder``, in its own dtype. ``record`` is the manifest of its run."""
    return _load(str(folder), record).to(device_and_dtype.run_device({}))


def _load(located: str, record: dict[str, Any]) -> Any:
    kwargs = {**bases.kwargs_to_open(located, record), "dtype": "auto"}
    return pretrained.load(located, device_and_dtype.usable(kwargs, print), record["role"] in adapters.WITH_HEAD).eval()


def to_plain(model: Any, folder: Path, record: dict[str, Any], dtype: torch.dtype) -> Any:
    """The opened model of a run as a Transformers model in ``dtype``, in main memory. ``model`` is used up.

    Raises:
        AlignkitError: PEFT cannot merge this adapter, or a weight is too large for ``dtype``.
    """
    if record["weights"] == "adapter":
        return merge(model.unload(), folder, dtype)
    round_parameters(model.named_modules(), dtype)
    return model


def merge(base: Any, adapter: Path, dtype: torch.dtype) -> Any:
    """``base`` with the adapter in the folder ``adapter`` merged into its weights, in ``dtype`` and in main memory.

    The weights of ``base`` are released, so it cannot be used afterwards. A scalar head stays in fp32.

    Raises:
        AlignkitError: PEFT cannot merge this adapter, or a weight is too large for ``dtype``.
    """
    import peft

    plain = _without_weights(base)
    modules = dict(plain.named_modules())
    kind = peft.PeftConfig.from_pretrained(str(adapter)).peft_type.value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that layers are merged already
            model = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()
            layers = layers_by_base(model)
            memory.release_freed()  # what loading the adapter took
            filled: dict[nn.Parameter, nn.Parameter] = {}  # by the empty parameter, which tied modules share
            for name, module in _by_parameter(modules):
                _fill(module, name, base.get_submodule(name), None if module in layers else dtype, filled)
                if module in layers:
                    for layer in layers[module]:
                        layer.merge(safe_merge=True)
                        release_lora(layer)
                    round_parameters([(name, module)], dtype)
                    memory.trim()
            plain = model.merge_and_unload()  # puts modules that the adapter saved whole in place
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise AlignkitError(f"the {kind} adapter in {adapter} cannot be merged: {one_line(error)}") from error
    round_parameters(plain.named_modules(), dtype)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:  # the adapter changed one of two tied weights
        plain.config.get_text_config().tie_word_embeddings = plain.config.tie_word_embeddings = False
    return plain


def _without_weights(base: Any) -> Any:
    """A model of the same class and config as ``base``, not quantized, whose parameters take no memory.

    They are single zeros, expanded, in main memory: PEFT would put an adapter on the meta device too. An adapter of
    embeddings is saved with the embeddings, so these are allocated.
    """
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        empty = type(base)(config)
    empty.tie_weights()
    embeddings = (empty.get_input_embeddings(), empty.get_output_embeddings())
    zeros: dict[nn.Parameter, nn.Parameter] = {}
    for module in empty.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in zeros:
                shape = parameter.shape
                zeros[parameter] = _frozen(
                    torch.empty(shape) if module in embeddings else torch.zeros(()).expand(shape)
                )
            module.register_parameter(key, zeros[parameter])
    return empty.eval()


def _by_parameter(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Named modules, those with a tied parameter one after the other: then its source is released at once."""
    first: dict[nn.Parameter, int] = {}
    places = dict[str, int]()
    for number, (name, module) in enumerate(modules.items()):
        places[name] = min([number, *(first.setdefault(each, number) for each in module.parameters(recurse=False))])
    return sorted(modules.items(), key=lambda item: places[item[0]])


def _fill(
    module: nn.Module, name: str, source: Any, dtype: torch.dtype | None, filled: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Move the weights of the module ``source`` into ``module``: in ``dtype``, or as copies in fp32 if that is None."""
    for key, empty in list(module.named_parameters(recurse=False)):
        if dtype is None:
            module.register_parameter(key, _frozen(_dense(source, key, module).to("cpu", torch.float32, copy=True)))
        else:
            if empty not in filled:
                filled[empty] = _frozen(rounded(_dense(source, key, module), dtype, f"{name}.{key}"))
            module.register_parameter(key, filled[empty])
        source.register_parameter(key, None)
    for key, _ in list(module.named_buffers(recurse=False)):
        setattr(module, key, source.get_buffer(key).cpu())


def _dense(source: Any, key: str, target: nn.Module) -> Tensor:
    """A parameter of a module of the base, dequantized."""
    if key == "weight" and is_quantized(source):
        weight = dense_weight(source)
        return weight.T if is_transposed(target) else weight
    parameter: Tensor | None = getattr(source, key, None)
    if parameter is None:
        raise AlignkitError(f"{type(source).__name__} layers are quantized in a format that cannot be dequantized")
    return parameter.detach()


def round_parameters(modules: Iterable[tuple[str, nn.Module]], dtype: torch.dtype) -> None:
    """Round the parameters of modules to ``dtype``, in main memory. Tied ones stay tied; a scalar head stays in fp32.

    Raises:
        AlignkitError: a weight is too large for ``dtype``.
    """
    done: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in modules:
        own = torch.float32 if name == "score" else dtype
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype is not own or parameter.device.type != "cpu":
                if parameter not in done:
                    done[parameter] = _frozen(rounded(parameter, own, f"{name}.{key}"))
                module.register_parameter(key, done[parameter])


def rounded(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``, in main memory.

    Raises:
        AlignkitError: it is too large for ``dtype``.
    """
    if not value.is_floating_point():
        return value.cpu()
    result = value.detach().to("cpu", dtype)
    if dtype is torch.float16 and value.dtype is not dtype and not result.isfinite().all():
        raise AlignkitError(
            f"{name} has values up to {value.abs().max():.3g}, which float16 cannot represent. Use bfloat16 or float32"
        )
    return result


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
