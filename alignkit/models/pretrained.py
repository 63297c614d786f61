"""Load a model from its files."""

from __future__ import annotations

from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignkit.errors import AlignkitError, one_line
from alignkit.runs import base


def load(located: str, kwargs: dict[str, Any], head: bool = False) -> PreTrainedModel:
    """Load a causal language model, or with ``head``, its trunk with a scalar head in place of the LM head.

    Calls ``AutoModelForCausalLM.from_pretrained``, or ``AutoModelForSequenceClassification.from_pretrained`` with one
    label.

    Raises:
        AlignkitError: the model could not be loaded.
    """
    kwargs = {"trust_remote_code": False, **kwargs}  # None would ask on a terminal
    try:
        if head:
            model = AutoModelForSequenceClassification.from_pretrained(located, num_labels=1, **kwargs)
            if hasattr(model, "score"):
                head_in_fp32(model, located)
        else:
            model = AutoModelForCausalLM.from_pretrained(located, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise AlignkitError(f"the model {located} could not be loaded: {one_line(error)}") from error
    return without_repacking(model)


def head_in_fp32(model: Any, located: str) -> None:
    """Convert the scalar head to fp32, with the unrounded weights of the files.

    In bf16, different answers would get equal scores.
    """
    trunk = f"{model.base_model_prefix}."
    head = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(trunk)}
    for parameter in head.values():
        parameter.data = parameter.data.float()
    folder = base.folder_of(located)
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
