"""What the policy is compared with: the run that it goes on from, in whatever form costs least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from alignkit.run import Run


@dataclass(frozen=True)
class Reference:
    """Where the reference's log-probabilities come from."""

    needed: bool  # by the loss
    precomputed: bool  # for the loss, before training
    kind: Literal["model", "adapter", "base", "none"]  # what is in memory of it

    def describe(self) -> str:
        """In words."""
        if not self.needed:
            return "none, the loss takes none"
        if self.precomputed:
            return "its log-probabilities are computed once, before training"
        if self.kind == "model":
            return "a frozen copy of the model"
        on = "the adapter that the policy started from, frozen," if self.kind == "adapter" else "no adapter"
        return f"{on} on the policy's own base"


def reference_of(run: Run, policy: Any) -> Reference:
    """The reference of a policy as it was loaded.

    A policy of adapters has the adapter that it started from beside its own, or none where it started without; either
    way there is one base in memory. Else the reference is a second model.
    """
    needed = run.config.loss.component.needs_reference
    precomputed = needed and run.config.stage.config.precompute_ref_log_probs
    in_memory = needed and not precomputed
    if hasattr(policy, "peft_config"):
        started = "policy" in run.records and run.records["policy"]["weights"] == "adapter"
        if not started:
            return Reference(needed, precomputed, "base")  # costs nothing
        return Reference(needed, precomputed, "adapter" if in_memory else "none")
    return Reference(needed, precomputed, "model" if in_memory else "none")
