"""Muon (Jordan et al. 2024) on hidden matrices, AdamW on everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from alignkit import Optimizer, hookimpl, option

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class MuonConfig:
    """The ``optimizer`` table of ``muon``; AdamW's settings are ``train.adam_beta1`` and so on."""

    momentum: Annotated[float, Ge(0), Lt(1)] = option(0.95, "momentum for the hidden matrices")
    ns_steps: Annotated[int, Gt(0), Lt(100)] = option(5, "Newton-Schulz steps that make an update orthogonal")


def build(config: MuonConfig, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Return a factory, which gets the model: the shape of a matrix does not tell whether it is hidden."""
    from alignkit_muon.optimizer import Muon

    return lambda: Muon, {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "momentum": config.momentum,
        "ns_steps": config.ns_steps,
    }


@hookimpl
def alignkit_optimizer() -> list[Optimizer]:
    return [
        Optimizer(
            name="muon",
            summary="orthogonalised updates of hidden matrices, AdamW for the rest",
            config=MuonConfig,
            build=build,
        )
    ]
