"""The reference of a stage on TRL's trainers: the policy that it starts from, in the form that needs least memory.

Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit.protocols import Plan, RunConfig


@dataclass(frozen=True)
class Reference:
    """The source of the reference's log-probabilities."""

    needed: bool  # the loss needs them
    precomputed: bool  # those of the rows are computed before training
    kind: Literal["model", "adapter", "base", "none"]  # what is kept in memory during training

    def describe(self) -> str:
        """The models in memory, for the plan."""
        if not self.needed:
            return "policy only; the loss needs no reference"
        if self.precomputed:
            return "policy only; the reference log-probabilities are computed before training"
        return "policy, reference: a model each" if self.kind == "model" else "policy, reference on one base"


def reference_of(config: RunConfig, adapters: bool, started: bool) -> Reference:
    """The reference of a policy that is trained as ``adapters`` or in full, and ``started`` from an adapter or not.

    With adapters, one base is in memory: the reference is the base with a copy of the adapter that the policy started
    from, or without any. Otherwise the reference is a second model. It is precomputed if the stage's config sets
    ``precompute_ref_log_probs``.
    """
    needed = config.loss.component.needs_reference
    precomputed = needed and config.stage.config.precompute_ref_log_probs
    if adapters and not started:
        return Reference(needed, precomputed, "base")  # needs no memory
    if not needed or precomputed:
        return Reference(needed, precomputed, "none")
    return Reference(needed, precomputed, "adapter" if adapters else "model")


def describe_reference(plan: Plan) -> str:
    """``Stage.in_memory`` of a stage with a reference: the models in memory."""
    adapters, policy = plan.config.tuner.component.adapters, plan.parents.get("policy")
    started = policy is not None and (adapters if policy.manifest is None else policy.manifest["weights"] == "adapter")
    return reference_of(plan.config, adapters, started).describe()
