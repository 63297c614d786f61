"""``torch.optim.Muon`` and ``torch.optim.AdamW`` as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Muon on the trained hidden matrices, AdamW on the rest, with one state dict.

    Muon's updates have the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982), so both use the same
    learning rate, and one that works for AdamW works here.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        ns_steps: int,
    ) -> None:
        hidden, rest = split(model)
        self.muon = torch.optim.Muon(
            [{"params": hidden}],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        others: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            others,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
        )
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both use this optimizer's parameter groups, whose learning rates a schedule changes, and its state."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss: float | None = self.muon.step(closure)  # type: ignore[no-untyped-call]
        self.adamw.step()
        return loss


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters, as (matrices that map hidden states to hidden states, the rest).

    The rest are embeddings, the LM head or scalar head, norms and biases. The matrices of an adapter are hidden
    matrices; its vectors are not, even if they are stored as matrices with one row.
    """
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        head: Any = getattr(module, "get_output_embeddings", lambda: None)()
        if head is not None:
            apart.add(id(head.weight))
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in apart
            (hidden if matrix else rest).append(parameter)
    return hidden, rest
