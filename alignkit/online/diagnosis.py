"""Checks of an online run: what must hold before and at the first step, and signs of common failures later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from alignkit.batches import PolicyBatch
from alignkit.errors import AlignkitError

if TYPE_CHECKING:
    from torch import Tensor


def tolerance(exact: bool) -> float:
    """The largest accepted mean difference of log-probabilities of the same tokens. In 16 bits, they change with the
    shape of the batch.
    """
    return 1e-4 if exact else 0.03


def check_reference(log_ratio: Tensor, mask: Tensor, exact: bool) -> None:
    """Check that the KL of the first answers is 0: the policy starts as the reference.

    ``log_ratio`` and ``mask`` are [B, A]; ``exact`` is whether the policy computes in fp32.

    Raises:
        AlignkitError: policy and reference differ.
    """
    difference = float(log_ratio[mask].abs().mean())
    if difference > tolerance(exact):
        raise AlignkitError(
            f"policy and reference differ by {difference:.2g} per token before the first step: the reference is not "
            "the model that the policy starts from, so the KL penalty would pull the policy away from it"
        )


def check_first_step(batch: PolicyBatch, model: Any, exact: bool, recompute: Callable[[], Tensor]) -> str | None:
    """Check at the first step that the policy is still the one that sampled.

    In 16 bits, log-probabilities change a little with the shape of the batch. ``recompute`` gives those of this very
    batch [B, A], computed as when answers are scored: if they agree, the difference is rounding.

    Args:
        batch: the first microbatch.
        model: the module that is trained.
        exact: whether the policy computes in fp32.
        recompute: computes the log-probabilities of the batch again.

    Returns:
        A line about rounding for the user, or None.

    Raises:
        AlignkitError: the policy has changed, so that every later number would be wrong; names the cause.
    """
    dropout = [name for name, m in model.named_modules() if type(m).__name__ == "Dropout" and m.p > 0]
    if dropout:
        raise AlignkitError(
            f"dropout is on in {dropout[0]}: log-probabilities would differ from those at sampling time"
        )
    if not batch.mask.any():  # the reward has refused all of these answers
        return None
    logps = batch.logps.detach()
    difference = float((logps - batch.old_logps)[batch.mask].abs().mean())
    if difference <= tolerance(exact):
        return None
    if not exact and difference <= 0.2 and float((logps - recompute())[batch.mask].abs().mean()) <= 0.01:
        return (
            f"the policy's log-probabilities differ by {difference:.2g} per token between batches of different shapes, "
            "from rounding in 16 bits. train.bf16=false avoids it, and is slower"
        )
    raise AlignkitError(
        f"the policy's log-probabilities in training differ from those before it by {difference:.2g} at the first "
        "step: its forward pass is not deterministic"
    )


class FailureSigns:
    """Warns once about each sign of a common failure.

    Args:
        table: the stage's name, for messages.
        say: prints a line for the user.
        expect_eos: whether answers are expected to end with a stop token.
    """

    def __init__(self, table: str, say: Callable[[str], None], expect_eos: bool) -> None:
        self.table, self.say, self.expect_eos = table, say, expect_eos
        self.warned: set[str] = set()

    def check(self, metrics: Mapping[str, float], first: Mapping[str, float]) -> None:
        """Compare the metrics of an iteration with those of the first."""
        collapsed = metrics["entropy"] < 0.2 * first["entropy"]
        self.warn(
            "entropy", collapsed, f"entropy has fallen below a fifth of its initial value. Raise {self.table}.kl_coef"
        )
        endless = self.expect_eos and metrics["eos_rate"] < 0.05
        self.warn("eos", endless, f"almost no answers end. Raise {self.table}.response_length, or train SFT for longer")
        longer = metrics["length"] > 2 * first["length"] and metrics["score"] > first["score"]
        self.warn(
            "length", longer, "answers are twice as long as at first, and score higher. The reward may favor length"
        )

    def warn(self, sign: str, present: bool, warning: str) -> None:
        """Print the warning about a sign if it is present, once."""
        if present and sign not in self.warned:
            self.warned.add(sign)
            self.say(f"warning: {warning}")
