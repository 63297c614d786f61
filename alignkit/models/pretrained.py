"""Load a model from its files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignkit.config.model_kwargs import OPTIONS, REFUSED
from alignkit.data import hub
from alignkit.errors import AlignkitError, one_line
from alignkit.runs import base


def load(located: str, kwargs: dict[str, Any], head: bool = False) -> PreTrainedModel:
    """Load a causal language model, or with ``head``, its trunk with a scalar head in place of the LM head.

    Calls ``AutoModelForCausalLM.from_pretrained``, or ``AutoModelForSequenceClassification.from_pretrained`` with one
    label.

    Raises:
        AlignkitError: the model could not be loaded.
    """
    kwargs = {"trust_remote_code": False, **kwargs, "output_loading_info": True}  # None would ask on a terminal
    try:
        if head:
            model, info = AutoModelForSequenceClassification.from_pretrained(located, num_labels=1, **kwargs)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(located, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, TypeError, RuntimeError) as error:
        raise AlignkitError(f"the model {located} could not be loaded: {_reason(error, located, kwargs)}") from error
    _check_complete(model, located, info["missing_keys"], head)
    _check_on_one_device(model, located)
    if head and hasattr(model, "score"):
        head_in_fp32(model, located, kwargs.get("revision"))
    return without_repacking(model)


def _reason(error: Exception, located: str, kwargs: Mapping[str, Any]) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "it runs code of its repository. If you trust that code, set model_kwargs.trust_remote_code=true"
    if isinstance(error, TypeError) and (unknown := re.search(r"unexpected keyword argument '(\w+)'", text)):
        return f"unknown key model_kwargs.{unknown[1]}: neither an argument of from_pretrained nor of its config"
    if "ignore_mismatched_sizes" in text:
        own = ", ".join(f"{key}={value}" for key, value in kwargs.items() if key not in (*OPTIONS, *REFUSED))
        because = f", with model_kwargs {own}" if own else ""
        return f"weights in its files have other shapes than its config says{because}"
    return one_line(error) if Path(located).is_dir() else hub.reason(error, located, kwargs.get("revision"))


def _check_complete(model: Any, located: str, missing: Collection[str], head: bool) -> None:
    """Check that the files have all weights. Transformers would initialize the others at random.

    Raises:
        AlignkitError: they lack some.
    """
    trunk = f"{model.base_model_prefix}."
    missing = sorted(name for name in missing if name.startswith(trunk) or not head)
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise AlignkitError(f"the model {located} could not be loaded: its files lack the weights {missing[0]}{more}")


def _check_on_one_device(model: Any, located: str) -> None:
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1:
        raise AlignkitError(
            f"the model {located} does not fit on one device (model_kwargs.device_map would use "
            f"{', '.join(sorted(devices))}). Use --plugin qlora, or a smaller model"
        )


def head_in_fp32(model: Any, located: str, revision: str | None = None) -> None:
    """Convert the scalar head to fp32, with the unrounded weights of the files.

    In bf16, different answers would get equal scores.
    """
    trunk = f"{model.base_model_prefix}."
    head = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(trunk)}
    for parameter in head.values():
        parameter.data = parameter.data.float()
    folder = base.folder_of(located, revision)
    for file in sorted(folder.glob("*.safetensors")) if folder else []:
        with safe_open(file, "pt") as tensors:
            for name in head.keys() & set(tensors.keys()):
                head[name].data.copy_(tensors.get_tensor(name))


def without_repacking(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking the 4-bit weights of ``model``.

    On a CPU with AVX512-BF16, the first forward pass without gradients repacks 4-bit weights for inference. From then
    on gradients are silently wrong. Sampling from a policy before training it would cause this. The kernel for
    repacked weights is also less accurate.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
