"""A role's model before and after the tuner: how it is loaded, and whether what plugins gave can serve the role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignkit.errors import PluginError
from alignkit.models import adapters
from alignkit.protocols import Run
from alignkit.registry import handover
from alignkit.runs import base
from alignkit.training import learning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def load(run: Run, role: str, name_or_path: str) -> PreTrainedModel:
    """The model that a role starts from, loaded by a plugin where one wants to, as the tuner asks for it.

    Raises:
        AlignkitError: it cannot be loaded, or the tuner cannot train it.
        PluginError: a plugin gave something else.
    """
    from torch import nn

    tuner, config = run.config.tuner.component, run.config.tuner.config
    arguments = handover.load_arguments(run.registry.who(tuner, "load"), tuner.load(config, run.dtype))
    kwargs = {"dtype": run.dtype, **arguments}
    head = role in adapters.WITH_HEAD

    def right(given: Any) -> bool:
        elsewhere = name_or_path != run.base and getattr(given, "name_or_path", name_or_path) == run.base
        headless = head and not hasattr(given, "score")
        return given is None or (isinstance(given, nn.Module) and not headless and not elsewhere)

    expected = f"a model or None, for a {role} from {name_or_path}"
    loaded: Any = run.registry.call(
        "alignkit_load_model", right, expected, run=run, role=role, name_or_path=name_or_path, kwargs=kwargs
    )
    if loaded is None:
        loaded = base.load(name_or_path, kwargs, head)
    if getattr(loaded, "is_quantized", False) and not tuner.adapters:
        raise base.refuse_quantised(run.config.model, loaded.quantization_method.value, tuner)
    return base.without_repacking(loaded)


def check_tuned(run: Run, role: str, model: nn.Module) -> None:
    """Whether what a tuner gave trains what it declares, and the scalar head of a value or a reward.

    Raises:
        PluginError: it does not.
    """
    tuner = run.config.tuner.component
    if adapters.trains_inputs(model) and tuner.trains != "inputs":
        raise PluginError(
            f"{run.registry.who(tuner)} trains inputs and declares weights. Tell its author: trains='inputs'"
        )
    if role in adapters.WITH_HEAD and not adapters.saves_head(model):
        raise PluginError(
            f"{run.registry.who(tuner)} does not train and save the scalar head of a {role} model. Use another tuner, "
            "or tell its author: modules_to_save=['score']"
        )


def say_what_is_trained(run: Run, role: str, model: nn.Module, name_or_path: str) -> None:
    """One line on what is trained, and a warning where experts are left out.

    Raises:
        AlignkitError: a weight is NaN or infinite.
    """
    learning.check_weights(model.named_parameters(), f"the model {name_or_path}")
    run.say(f"{role}: {learning.describe(model)}")
    if warning := learning.frozen_experts(model):
        run.say(warning)
