"""Models by the role that they play in a stage: policy, reference, value, reward.

A policy is a causal language model; a value or a reward is the same trunk with a scalar head, which is exactly
Transformers' model for sequence classification with one label. Importing this module imports torch.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.models import device, pretrained
from alignkit.models.peft_internals import belongs_to
from alignkit.runs import base, lineage

WITH_HEAD = ("value", "reward")


def fresh_head(model: Any, pad_token_id: int | None) -> None:
    """Start the scalar head at N(0, 1/sqrt(d + 1)), as "learning to summarize" (arXiv 2009.01325) does; d is the width.

    ``pad_token_id`` is what plain Transformers looks for to find where a padded sequence ends.
    """
    weight = model.score.weight
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(std=1 / math.sqrt(weight.shape[1] + 1)))
    model.config.pad_token_id = pad_token_id


def copy_adapter(model: Any, source: str, name: str, trained: bool) -> None:
    """Give a PEFT model another adapter ``name`` with the settings and the weights of its adapter ``source``."""
    import peft

    config = copy.deepcopy(model.peft_config[source])
    weights = peft.get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    _add_adapter(model, name, config, weights, trained)


def load_adapter(model: Any, folder: Path, name: str, trained: bool) -> Tensor | None:
    """Give a PEFT model the adapter in ``folder`` as ``name``; the weight of its scalar head, where it has one."""
    import peft

    weights = peft.load_peft_weights(str(folder), device="cpu")
    head = next((weights.pop(key) for key in list(weights) if key.endswith("score.weight")), None)
    _add_adapter(model, name, peft.PeftConfig.from_pretrained(str(folder)), weights, trained)
    return head


def _add_adapter(model: Any, name: str, config: Any, weights: dict[str, Tensor], trained: bool) -> None:
    """``weights`` may lack modules that the adapter was saved with, such as a scalar head: those are not added."""
    import peft

    saved = getattr(config, "modules_to_save", None) or []
    config.modules_to_save = [module for module in saved if any(f".{module}." in key for key in weights)] or None
    config.task_type, config.inference_mode = model.peft_config["default"].task_type, False
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    # not a classifier's own `add_adapter`, which adds a head; it may freeze modules that other adapters train
    peft.PeftModel.add_adapter(model, name, config)
    peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trained if belongs_to(name, key) else before.get(key, False))


def check_base_frozen(model: Any) -> None:
    """Whether all that a PEFT model trains belongs to its adapter, so that the model without it is still there.

    Raises:
        AlignkitError: it also trains weights of the base, which the reference would share.
    """
    shared = [name for name, p in model.named_parameters() if p.requires_grad and not belongs_to("default", name)]
    if shared:
        raise AlignkitError(
            f"the tuner trains {shared[0]} outside its adapter: the reference would change with the policy. Use "
            "settings that leave the base as it is (no trained biases), or another tuner"
        )


def trains_inputs(model: Any) -> bool:
    """Whether a model is PEFT's and has trained inputs (prompt or prefix tuning) in place of weights in its layers."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def check_weights_trained(model: Any) -> None:
    """Whether a model computes all that was trained where its layers are called past PEFT's own forward.

    Raises:
        AlignkitError: it has trained inputs, which PEFT puts before the prompt.
    """
    if trains_inputs(model):
        raise AlignkitError("a model of prompt or prefix tuning can be trained by sft and sampled from, no more")


def continue_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """``model`` started from the adapter in ``folder``: its adapter gets the same weights; without one they are merged.

    Raises:
        AlignkitError: the adapter does not fit.
    """
    import peft

    if not isinstance(model, peft.PeftModel):
        if peft.PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            raise AlignkitError(f"the trained inputs in {folder} cannot be merged into weights: use its own tuner")
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model = _with_adapter(model, folder).merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        return model
    weights, fresh = peft.load_peft_weights(str(folder), device="cpu"), peft.get_peft_model_state_dict(model)
    inner = model.get_base_model()
    if inner.get_output_embeddings() is None:  # a scalar head: what was saved of a language model's head has no place
        trunk = f"base_model.model.{inner.base_model_prefix}."
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(trunk) or name in fresh}
    for name, tensor in weights.items():
        if name not in fresh or fresh[name].shape != tensor.shape:
            raise AlignkitError(f"the adapter in {folder} cannot be continued: there is no such {name} in this model's")
    peft.set_peft_model_state_dict(model, {**fresh, **weights})  # a head that the former had not stays fresh
    return model


def saves_head(model: nn.Module) -> bool:
    """Whether the scalar head is trained, and under PEFT saved with the adapter."""
    adapter = "modules_to_save." if hasattr(model, "peft_config") else ""
    return any(p.requires_grad and f"score.{adapter}" in name for name, p in model.named_parameters())


def head_in_fp32(model: nn.Module) -> None:
    """Train the scalar head in fp32, like the adapters beside it: in bf16, updates below 1/256 of a weight are lost."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "score." in name:
            parameter.data = parameter.data.float()


DROPOUTS = ("dropout", "attention_dropout", "attn_dropout", "resid_dropout", "activation_dropout", "layerdrop")


def without_dropout(model: Any) -> Any:
    """``model`` with every dropout at 0, so that a score or a log-probability is the same number each time."""
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
    config.task_type = None  # the trunk alone matters, whatever is on top of it here
    return peft.PeftModel.from_pretrained(model, str(folder), config=config)


def open_run(folder: Path, record: dict[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a finished run, on its base in the form that it was trained on, in evaluation mode.

    A reward run gives a model for sequence classification with one label, every other a causal language model.
    ``dtype`` is what it computes in; None is what the device does well.
    """
    import peft

    head = record["role"] in WITH_HEAD
    kwargs: dict[str, Any] = {"dtype": dtype or device.run_dtype({})}
    if record["weights"] == "model":
        return pretrained.load(str(folder), kwargs, head).eval()
    tuner, config = lineage.tuner(record)
    kwargs |= tuner.load(config, getattr(torch, record["dtype"]))
    trunk = pretrained.load(base.under(record, folder, print), kwargs, head)
    return peft.PeftModel.from_pretrained(trunk, str(folder)).eval()
