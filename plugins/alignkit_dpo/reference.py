"""What the policy is compared with: the run that it goes on from, in whatever form costs least. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit import RunConfig


@dataclass(frozen=True)
class Reference:
    """Where the reference's log-probabilities come from."""

    needed: bool  # by the loss
    precomputed: bool  # for the loss, before training
    kind: Literal["model", "adapter", "base", "none"]  # what is in memory of it

    def describe(self) -> str:
        """What is in memory, in words."""
        if not self.needed:
            return "policy alone, the loss needs no reference"
        if self.precomputed:
            return "policy alone, the reference speaks once before training"
        return "policy, reference: a model each" if self.kind == "model" else "policy, reference on one base"


def reference_of(config: RunConfig, adapters: bool, started: bool) -> Reference:
    """The reference of a policy that is made of ``adapters`` or not, and ``started`` from an adapter or not.

    A policy of adapters has the adapter that it started from beside its own, or none where it started without; either
    way there is one base in memory. Else the reference is a second model.
    """
    needed = config.loss.component.needs_reference
    precomputed = needed and config.stage.config.precompute_ref_log_probs
    if adapters and not started:
        return Reference(needed, precomputed, "base")  # costs nothing
    if not needed or precomputed:
        return Reference(needed, precomputed, "none")
    return Reference(needed, precomputed, "adapter" if adapters else "model")
