"""What alignkit uses of Transformers, accelerate and torch that is not their public API, and of nothing else.

Each function names the versions that it was checked with. ``tests/test_internals.py`` fails when a release changes one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def forward_without_autocast(model: Any) -> Any:
    """A model's forward as it was before ``Accelerator.prepare`` wrapped it in autocast (accelerate 1.15).

    ``Accelerator.unwrap_model(keep_fp32_wrapper=False)`` would remove the wrapper for good.
    """
    return getattr(model, "_original_forward", model.forward)


def load_balancing_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The auxiliary loss of a mixture of experts, from its trunk's router logits (Transformers 5.23).

    It is the loss that the model's own forward returns as ``aux_loss``. All families share Mixtral's function.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss: Tensor = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    return loss
