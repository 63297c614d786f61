"""Loads the model of a role: the base model, then the tuner, then the adapter that it starts from.

What plugins return is checked on the way. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from alignkit.errors import ConfigError, PluginError, one_line
from alignkit.models import adapters, device_and_dtype, pretrained
from alignkit.protocols import Run
from alignkit.registry import checks
from alignkit.runs import base
from alignkit.training import learning


def load(run: Run, role: str, start: str) -> nn.Module:
    """The model of a role, made trainable by the tuner and started from the parent ``start``; see ``alignkit.Run``.

    Raises:
        AlignkitError: the model cannot be loaded, a weight of it is NaN or infinite, or the tuner cannot train it.
        PluginError: a plugin returned something that cannot serve the role.
    """
    record = run.records.get(start)
    name_or_path, kwargs = run.base, run.model_kwargs
    if record and start != "policy":
        name_or_path = base.of_run(record, run.parents[start], run.say)
        kwargs = base.with_commit(base.kwargs_of_run(run.config.model_kwargs, name_or_path, record), name_or_path)
    loaded = _load_base(run, role, name_or_path, kwargs)
    transformers.set_seed(run.config.train.get("seed", 42))
    if role in adapters.WITH_HEAD:
        if record is None or record["role"] not in adapters.WITH_HEAD:
            adapters.fresh_head(loaded, run.score_pad_token_id)
    else:
        loaded.generation_config.eos_token_id = run.stop_ids
        loaded.generation_config.pad_token_id = run.tokenizer.pad_token_id
    model = _wrap(run, role, loaded)
    adapters.set_base_revision(model, kwargs.get("revision"))
    if record and record["weights"] == "adapter":
        model = adapters.continue_adapter(model, run.parents[start])
    _check_tuned(run, role, model)
    if role in adapters.WITH_HEAD:
        adapters.head_in_fp32(model)
    run.registry.call("alignkit_model_ready", run=run, role=role, model=model)
    learning.check_weights(model.named_parameters(), f"the model {name_or_path}")
    run.say(f"{role}: {learning.describe(model)}")
    if warning := learning.frozen_experts(model):
        run.say(warning)
    return model


def _load_base(run: Run, role: str, name_or_path: str, model_kwargs: Mapping[str, Any]) -> Any:
    """The base model of a role: from ``alignkit_load_model`` if a plugin returns one, else from Transformers."""
    tuner, config = run.config.tuner.component, run.config.tuner.config
    arguments = checks.load_arguments(run.registry.describe(tuner, "load"), tuner.load(config, run.dtype))
    kwargs = {"dtype": run.dtype, **model_kwargs, **arguments}
    device_and_dtype.check_loading(kwargs, run.device, run.dtype, run.processes)
    with_head = role in adapters.WITH_HEAD

    def fits(model: Any) -> bool:
        if model is None:
            return True
        of_other_base = name_or_path != run.base and getattr(model, "name_or_path", name_or_path) == run.base
        return isinstance(model, nn.Module) and not of_other_base and (hasattr(model, "score") or not with_head)

    expected = f"a model or None, for a {role} from {name_or_path}"
    loaded = run.registry.call(
        "alignkit_load_model", fits, expected, run=run, role=role, name_or_path=name_or_path, kwargs=kwargs
    )
    if loaded is None:
        loaded = pretrained.load(name_or_path, kwargs, with_head)
    if getattr(loaded, "is_quantized", False) and not tuner.adapters:
        raise base.quantized_error(run.config.model, loaded.quantization_method.value, tuner)
    return pretrained.without_repacking(loaded)


def _wrap(run: Run, role: str, loaded: Any) -> Any:
    """The loaded model as the tuner makes it trainable."""
    tuner, config = run.config.tuner.component, run.config.tuner.config
    try:
        return checks.model(run.registry.describe(tuner, "wrap"), tuner.wrap(config, loaded, role))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"tuner '{tuner.name}' does not work with {run.config.model}: {one_line(error)}") from error


def _check_tuned(run: Run, role: str, model: nn.Module) -> None:
    """Check that a tuner trains what it declares, and the scalar head of a value or a reward."""
    tuner = run.config.tuner.component
    if adapters.trains_inputs(model) and tuner.trains != "inputs":
        raise PluginError(
            f"{run.registry.describe(tuner)} trains inputs, but declares trains='weights'. Tell its author to declare "
            "trains='inputs'"
        )
    if role in adapters.WITH_HEAD and not adapters.saves_head(model):
        raise PluginError(
            f"{run.registry.describe(tuner)} does not train and save the scalar head of a {role} model. Use another "
            "tuner, or tell its author: modules_to_save=['score']"
        )
