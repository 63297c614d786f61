"""What a run trains, and whether its losses and weights are numbers. Importing this module imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from alignkit.data.encoding import Ranked
from alignkit.data.prompts import prompt_text
from alignkit.errors import AlignkitError
from alignkit.models import Sequences
from alignkit.models.peft_internals import is_adapted
from alignkit.protocols import Run

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer


def describe(model: Any) -> str:
    """How many of a model's weights are trained, and in which layers."""
    if hasattr(model, "peft_config"):
        trained, total = model.get_nb_trainable_parameters()  # it knows how 4-bit weights are packed
    else:
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == total:
        return f"training all {total:,} weights"
    return f"training {trained:,} of {total:,} weights ({trained / total:.2%}): {', '.join(_kinds(model))}"


def _kinds(model: nn.Module) -> list[str]:
    """The names of the layers that are trained, without their place in the model: ``q_proj``, ``v_proj``."""
    adapted = {name for name, module in model.named_modules() if is_adapted(module)}
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")[:-1]
            above = (".".join(parts[: end + 1]) for end in range(len(parts)))
            owner = next((path for path in above if path in adapted), ".".join(parts))
            found[owner.rpartition(".")[2]] = None
    return list(found)


def frozen_experts(model: nn.Module) -> str | None:
    """A warning where adapters leave the experts of a mixture out: they are single tensors, not linear layers."""
    if not hasattr(model, "peft_config"):
        return None
    names = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n and not p.requires_grad]
    if not names or any(".experts" in name for name, module in model.named_modules() if is_adapted(module)):
        return None
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"warning: the routed experts ({kinds}) stay frozen: adapters are put on linear layers alone"


def check_weights(named: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]], what: str) -> None:
    """Whether all weights are numbers.

    Raises:
        AlignkitError: one is NaN or infinite.
    """
    bad = next((name for name, weight in dict(named).items() if not _finite(weight)), None)
    if bad:
        raise AlignkitError(f"{what}: {bad} holds NaN or infinity")


def _finite(weight: Tensor) -> bool:
    import torch

    return not weight.is_floating_point() or bool(weight.detach().sum(dtype=torch.float32).isfinite())


def watch_loss(trainer: Trainer, run: Run) -> None:
    """Have ``trainer`` stop at a loss that is NaN or infinite. The Trainer itself goes on and leaves it out of logs."""
    step = trainer.training_step

    def watched(model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Tensor:
        loss: Tensor = step(model, inputs, *arguments, **keywords)
        if not loss.isfinite().all():
            rows = _excerpts(inputs, run.tokenizer)
            named = f" on rows that begin {', '.join(rows)}" if rows else ""
            raise AlignkitError(
                f"the loss of step {trainer.state.global_step + 1} is {float(loss)}{named}. Nothing was finished. "
                "Lower train.learning_rate, or look for what is special in these rows"
            )
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
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
