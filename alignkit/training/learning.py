"""Reports what a run trains, and stops a run that cannot learn: no gradients, NaN in losses or weights.

Importing this module imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from alignkit.data.encoding import Ranked
from alignkit.data.prompts import prompt_text
from alignkit.errors import AlignkitError
from alignkit.models import Roles, Sequences
from alignkit.models.peft_internals import is_adapted
from alignkit.protocols import Run

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer

PATIENCE = 10  # optimizer steps with zero gradients before a run stops


def describe(model: Any) -> str:
    """The number of parameters of a model that are trained, and their layers."""
    if hasattr(model, "peft_config"):
        trained, total = model.get_nb_trainable_parameters()  # handles packed 4-bit weights
    else:
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == total:
        return f"training all {total:,} parameters"
    layers = ", ".join(_trained_layers(model))
    return f"training {trained:,} of {total:,} parameters ({trained / total:.2%}): {layers}"


def _trained_layers(model: nn.Module) -> list[str]:
    """The names of the layers that are trained, without their path in the model: ``q_proj``, ``v_proj``."""
    adapted = {name for name, module in model.named_modules() if is_adapted(module)}
    names: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")[:-1]
            ancestors = (".".join(parts[: end + 1]) for end in range(len(parts)))
            layer = next((path for path in ancestors if path in adapted), ".".join(parts))
            names[layer.rpartition(".")[2]] = None
    return list(names)


def frozen_experts(model: nn.Module) -> str | None:
    """A warning if adapters leave out the experts of a mixture of experts, which are tensors and not linear layers."""
    if not hasattr(model, "peft_config"):
        return None
    names = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n and not p.requires_grad]
    if not names or any(".experts" in name for name, module in model.named_modules() if is_adapted(module)):
        return None
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"warning: the routed experts ({kinds}) stay frozen: only linear layers have adapters"


def check_weights(weights: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]], model: str) -> None:
    """Check that all weights are finite. ``model`` names it in the error.

    Raises:
        AlignkitError: a weight is NaN or infinite.
    """
    bad = next((name for name, weight in dict(weights).items() if not _is_finite(weight)), None)
    if bad:
        raise AlignkitError(f"{model} has NaN or infinite values in {bad}")


def _is_finite(weight: Tensor) -> bool:
    import torch

    return not weight.is_floating_point() or bool(weight.detach().sum(dtype=torch.float32).isfinite())


def watch_loss(trainer: Trainer, run: Run) -> None:
    """Make ``trainer`` stop at a NaN or infinite loss. By default, the Trainer continues and hides it in its logs."""
    training_step = trainer.training_step

    def checked(model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Tensor:
        loss: Tensor = training_step(model, inputs, *arguments, **keywords)
        if not loss.isfinite().all():
            excerpts = _excerpts(inputs, run.tokenizer)
            rows = f" on rows that begin {', '.join(excerpts)}" if excerpts else ""
            raise AlignkitError(
                f"the loss of step {trainer.state.global_step + 1} is {float(loss)}{rows}. The run was not finished. "
                "Lower train.learning_rate, or check these rows"
            )
        return loss

    trainer.training_step = checked  # type: ignore[method-assign]
    trainer.args.logging_nan_inf_filter = False


def _excerpts(inputs: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The beginnings of a microbatch's first rows."""
    texts: list[str] = []
    for value in inputs.values():
        ids = value.input_ids if isinstance(value, Sequences) else None
        if isinstance(value, list) and value and isinstance(value[0], Ranked):
            texts = [prompt_text(ranked.prompt) for ranked in value]
        elif ids is not None:
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if not texts and "input_ids" in inputs:
        texts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    return [repr(" ".join(text.split())[:60]) for text in texts[:4]]


class LearningCheck(TrainerCallback):
    """Stops a run whose policy gets no gradients, and a run whose held-out loss is NaN or infinite."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.learns = bool(run.config.train.get("deepspeed"))  # which keeps the gradients to itself
        self.zero_steps = 0  # optimizer steps so far with zero gradients

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.learns or state.global_step < self.run.policy_learns_from:
            return
        has_roles = isinstance(model, Roles)
        trained = model.trained("policy") if has_roles else model.named_parameters()
        gradients = [p.grad for _, p in trained if p.requires_grad and p.grad is not None]
        if not gradients:
            self._stop("no weight of the policy has a gradient")
        # Zero gradients are correct for a batch of sampled answers with equal scores, but not for other losses.
        self.learns = has_roles or any(bool(gradient.any()) for gradient in gradients)
        self.zero_steps += not self.learns
        if self.zero_steps == PATIENCE:
            self._stop(f"all gradients of the first {PATIENCE} steps are zero")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.zero_steps and not self.learns and state.global_step >= state.max_steps:
            self._stop("all gradients were zero")

    def _stop(self, reason: str) -> None:
        tuner, stage = self.run.config.tuner.component, self.run.config.stage.component
        raise AlignkitError(
            f"{reason}: the run cannot learn. What {self.run.registry.describe(tuner)} trains does not affect the "
            f"loss of {self.run.registry.describe(stage)}"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = (metrics or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise AlignkitError(f"the held-out loss at step {state.global_step} is {loss}. The run was not finished")
