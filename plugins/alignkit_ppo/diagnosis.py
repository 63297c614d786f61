"""PPO looks at itself: what must hold at the first step, and what later steps warn of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignkit import AlignkitError, PolicyBatch

if TYPE_CHECKING:
    from torch import Tensor


def first_answers(log_ratio: Tensor, mask: Tensor, exact: bool) -> None:
    """The KL of the first answers is 0: the policy starts as the reference. ``log_ratio`` and ``mask`` are [B, A].

    Raises:
        AlignkitError: it is not.
    """
    off = float(log_ratio[mask].abs().mean())
    if off > (1e-4 if exact else 0.03):
        raise AlignkitError(
            f"policy and reference differ by {off:.2g} a token before the first step: the reference is not the model "
            "that the policy starts from, and the KL penalty would pull it elsewhere"
        )


def first_step(batch: PolicyBatch, model: Any, exact: bool, again: Callable[[], Tensor]) -> str | None:
    """At the first step the policy is still the one that sampled; ``exact`` is whether it computes in fp32.

    In 16 bits, log-probabilities change a little with the shape of the batch. ``again`` gives those of this very batch
    [B, T], as they are computed when answers are scored: where they agree, the difference is rounding. Returns a line
    about it, where there is something to say.

    Raises:
        AlignkitError: the policy is another, which makes everything after it wrong; names the cause.
    """
    dropout = [name for name, m in model.named_modules() if type(m).__name__ == "Dropout" and m.p > 0]
    if dropout:
        raise AlignkitError(f"dropout is on in {dropout[0]}: log-probabilities would not be those of the sampling")
    off = float((batch.logps.detach() - batch.old_logps)[batch.mask].abs().mean())
    if off <= (1e-4 if exact else 0.03):
        return None
    if not exact and off <= 0.2 and float((batch.logps.detach() - again())[batch.mask].abs().mean()) <= 0.01:
        return (
            f"the policy's log-probabilities differ by {off:.2g} a token between batches of different shapes, by "
            "rounding in 16 bits. train.bf16=false avoids it, and is slower"
        )
    raise AlignkitError(
        f"the policy's log-probabilities in training differ from those before it by {off:.2g} at the first step: "
        "something makes its forward differ from call to call"
    )


def value_only(batch: PolicyBatch) -> PolicyBatch:
    """The batch with a policy that has nothing to learn: its log-probabilities of then, and no advantages."""
    still = batch.old_logps + 0 * batch.logps
    return dataclasses.replace(batch, logps=still, advantages=0 * batch.advantages, entropy=batch.entropy.detach())


class Watch:
    """Warns once of each thing that commonly goes wrong; ``ends``: whether answers are meant to end by themselves."""

    def __init__(self, say: Callable[[str], None], ends: bool) -> None:
        self.say, self.ends = say, ends
        self.warned: set[str] = set()

    def iteration(self, logs: dict[str, float], first: dict[str, float]) -> None:
        """Look at the figures of an iteration, beside those of the first."""
        self._warn(
            "entropy", logs["entropy"] < 0.2 * first["entropy"], "entropy has collapsed to a fifth: raise kl_coef"
        )
        never = self.ends and logs["eos_rate"] < 0.05
        self._warn("eos", never, "almost no answer ends: raise ppo.response_length or train SFT longer")
        grew = logs["length"] > 2 * first["length"] and logs["score"] > first["score"]
        self._warn(
            "length", grew, "answers are twice as long as at first and score higher: the reward may favour length"
        )

    def _warn(self, what: str, bad: bool, why: str) -> None:
        if bad and what not in self.warned:
            self.warned.add(what)
            self.say(f"warning: {why}")
