"""Whether a prompt is computed once for both of a pair's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit import AlignkitError, Run
from alignkit.data.encoding import Branches
from alignkit.models import branches
from alignkit_dpo.pairs import Collator, Pair

if TYPE_CHECKING:
    import torch


def shared_prompt(run: Run, policy: Any, pairs: Sequence[Pair], device: torch.device) -> torch.dtype | None:
    """The number format of the tree's mask, or None for separate forwards: as the config says, else where it is faster.

    Raises:
        AlignkitError: the config wants it, and this model cannot do it exactly.
    """
    wanted = run.config.stage.config.shared_prompt
    if wanted is False:
        return None
    longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs)
    experts = hasattr(policy.config, "output_router_logits")  # their balance is of whole rows, told by a 2D mask
    exact = not experts and branches.supports_tree(policy.config, longest) and _agrees(run, policy, pairs, device)
    if wanted and not exact:
        raise AlignkitError(
            f"dpo.shared_prompt: {run.config.model} cannot branch several answers off one prompt exactly"
        )
    saving = branches.saving(
        [
            Branches(p["prompt_ids"][:-1], [p["prompt_ids"][-1:] + p[n] for n in ("chosen_ids", "rejected_ids")])
            for p in pairs
        ],
        policy.config,
    )
    if exact and (wanted or saving > 1.05):
        run.say(
            f"shared prompt: a prompt is computed once for its answers, which saves {1 - 1 / saving:.0%} of the work"
        )
        dtype: torch.dtype = policy.dtype
        return dtype
    return None


def _agrees(run: Run, policy: Any, pairs: Sequence[Pair], device: torch.device) -> bool:
    """Whether the model computes the shortest pair the same with a shared prompt as without, to rounding."""
    import torch

    pair = min(pairs, key=lambda p: len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]))
    training, said = policy.training, []
    policy.to(device).eval()
    exact = run.dtype is torch.float32
    with torch.no_grad(), torch.autocast(device.type, run.dtype, enabled=not exact):
        for tree in (None, policy.dtype):
            batch = {n: t.to(device) for n, t in Collator(run.tokenizer.pad_token_id, tree)([pair]).items()}
            given = {n: batch[n] for n in ("input_ids", "attention_mask", "position_ids") if n in batch}
            logits = policy(**given, use_cache=False).logits[batch["rows"][:, None], batch["columns"]]
            there = torch.arange(logits.shape[1], device=device) < batch["lengths"][:, None]
            said.append(logits.float().log_softmax(-1)[there])
    policy.train(training)
    apart, together = said
    return bool((apart - together).abs().max() <= (1e-3 if exact else 0.1) * (1 + apart.abs().max()))
