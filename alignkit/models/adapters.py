"""The model of a role: its adapters, its scalar head, and its dropout.

A policy is a causal language model. A value or a reward is the same trunk with a scalar head: Transformers' model for
sequence classification with one label.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.models import device_and_dtype, pretrained
from alignkit.models.peft_internals import belongs_to
from alignkit.runs import base, lineage
from alignkit.runs import weights as run_weights

WITH_HEAD = ("value", "reward")


def set_base_revision(model: Any, commit: str | None) -> None:
    """Record in the adapters of a PEFT model which commit of a hub model they belong to. PEFT loads that one then."""
    for config in getattr(model, "peft_config", {}).values():
        config.revision = commit


def fresh_head(model: Any, pad_token_id: int | None) -> None:
    """Initialize the scalar head from N(0, 1/sqrt(d + 1)), as in "learning to summarize" (arXiv 2009.01325).

    d is the hidden size. Transformers uses ``pad_token_id`` to find where a padded sequence ends.
    """
    weight = model.score.weight
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(std=1 / math.sqrt(weight.shape[1] + 1)))
    model.config.pad_token_id = pad_token_id


def copy_adapter(model: Any, source: str, name: str, trained: bool) -> None:
    """Add an adapter ``name`` to a PEFT model, with the config and the weights of its adapter ``source``."""
    import peft

    config = copy.deepcopy(model.peft_config[source])
    weights = peft.get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    _add_adapter(model, name, config, weights, trained)


def load_adapter(model: Any, folder: Path, name: str, trained: bool) -> Tensor | None:
    """Add the adapter in ``folder`` to a PEFT model as ``name``, and return the weight of its scalar head, if any."""
    import peft

    run_weights.check(folder)
    weights = peft.load_peft_weights(str(folder), device="cpu")
    head = next((weights.pop(key) for key in list(weights) if key.endswith("score.weight")), None)
    _add_adapter(model, name, peft.PeftConfig.from_pretrained(str(folder)), weights, trained)
    return head


def _add_adapter(model: Any, name: str, config: Any, weights: dict[str, Tensor], trained: bool) -> None:
    """Add an adapter with these weights. Modules that it was saved with but that have no weights here are left out."""
    import peft

    modules = getattr(config, "modules_to_save", None) or []
    config.modules_to_save = [module for module in modules if any(f".{module}." in key for key in weights)] or None
    config.task_type, config.inference_mode = model.peft_config["default"].task_type, False
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    # the method of PeftModelForSequenceClassification adds a head; both may freeze modules of other adapters
    peft.PeftModel.add_adapter(model, name, config)
    peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trained if belongs_to(name, key) else before.get(key, False))


def check_base_frozen(model: Any) -> None:
    """Check that a PEFT model trains its adapter only, so that the base without it can be the reference.

    Raises:
        AlignkitError: it also trains weights of the base.
    """
    shared = [name for name, p in model.named_parameters() if p.requires_grad and not belongs_to("default", name)]
    if shared:
        raise AlignkitError(
            f"the tuner trains {shared[0]} outside its adapter: the reference would change with the policy. Use "
            "settings that leave the base as it is (no trained biases), or another tuner"
        )


def trains_inputs(model: Any) -> bool:
    """Whether a model is a PEFT model with prompt or prefix tuning, which trains inputs and no weights of layers."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def check_weights_trained(model: Any) -> None:
    """Check that nothing is lost when the model inside of PEFT's wrapper is called directly.

    Raises:
        AlignkitError: the model has trained inputs, which PEFT's forward puts before the prompt.
    """
    if trains_inputs(model):
        raise AlignkitError("a model with prompt or prefix tuning can only be trained by sft and sampled from")


def continue_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """``model`` initialized from the adapter in ``folder``, whose weights are copied into its adapter, or merged.

    They are merged into the base if the model is not a PEFT model.

    Raises:
        AlignkitError: the adapter does not fit the model.
    """
    import peft

    run_weights.check(folder)
    if not isinstance(model, peft.PeftModel):
        if peft.PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            raise AlignkitError(
                f"{folder} has trained inputs, which cannot be merged into weights: use the tuner that trained it"
            )
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model = _with_adapter(model, folder).merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        return model
    weights, fresh = peft.load_peft_weights(str(folder), device="cpu"), peft.get_peft_model_state_dict(model)
    inner = model.get_base_model()
    if inner.get_output_embeddings() is None:  # a scalar head: drop weights of the language model's head
        trunk = f"base_model.model.{inner.base_model_prefix}."
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(trunk) or name in fresh}
    for name, tensor in weights.items():
        if name not in fresh or fresh[name].shape != tensor.shape:
            raise AlignkitError(
                f"the adapter in {folder} cannot be continued: {name} does not fit the adapter of this model"
            )
    peft.set_peft_model_state_dict(model, {**fresh, **weights})  # a head that the saved adapter lacks stays fresh
    return model


def saves_head(model: nn.Module) -> bool:
    """Whether the scalar head is trained, and saved with the adapter if there is one."""
    adapter = "modules_to_save." if hasattr(model, "peft_config") else ""
    return any(p.requires_grad and f"score.{adapter}" in name for name, p in model.named_parameters())


def head_in_fp32(model: nn.Module) -> None:
    """Train the scalar head in fp32, like the adapters beside it: in bf16, updates below 1/256 of a weight are lost."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "score." in name:
            parameter.data = parameter.data.float()


DROPOUTS = ("dropout", "attention_dropout", "attn_dropout", "resid_dropout", "activation_dropout", "layerdrop")


def without_dropout(model: Any) -> Any:
    """``model`` with every dropout set to 0, so that scores and log-probabilities are deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _with_adapter(model: nn.Module, folder: Path) -> Any:
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # the adapter of the trunk, whatever head is on it
    return peft.PeftModel.from_pretrained(model, str(folder), config=config)


def open_run(folder: Path, record: dict[str, Any], dtype: torch.dtype | str | None = None) -> nn.Module:
    """The model of a finished run in evaluation mode, on its base in the form that it was trained on.

    It is a model for sequence classification with one label for a reward run, else a causal language model. It computes
    in ``dtype``, or if that is None in the fastest dtype that suits the device. ``"auto"`` is
    that of its files.
    """
    import peft

    run_weights.check(folder)
    if record["weights"] == "model":
        kwargs = {"dtype": dtype or device_and_dtype.run_dtype({}), **base.kwargs_to_open(str(folder), record)}
        kwargs = {**device_and_dtype.usable(kwargs, print), "use_safetensors": True}
        return pretrained.load(str(folder), kwargs, record["role"] in WITH_HEAD).eval()
    return peft.PeftModel.from_pretrained(open_base(folder, record, dtype), str(folder)).eval()


def open_base(folder: Path, record: dict[str, Any], dtype: torch.dtype | str | None = None) -> nn.Module:
    """The base model of a finished run in evaluation mode, in the form that it was trained on, without its training.

    Raises:
        ConfigError: it is gone or has changed since.
    """
    kwargs: dict[str, Any] = {"dtype": dtype or device_and_dtype.run_dtype({})}
    if record["weights"] == "model":
        located = base.locate(record["model"]["name"], print)
        base.check_unchanged(located, record["model"], f"{folder} was trained from")
        kwargs |= base.kwargs_to_open(located, {**record, "base": record["model"]})
    else:
        located = base.of_run(record, folder, print)
        kwargs |= base.kwargs_to_open(located, record)
        tuner, config = lineage.tuner(record)
        kwargs |= tuner.load(config, getattr(torch, record["dtype"]))
    return pretrained.load(located, device_and_dtype.usable(kwargs, print), record["role"] in WITH_HEAD).eval()
