"""Log-probabilities of answers, from one forward pass over a batch of :class:`alignkit_dpo.pairs.Collator`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit import Run
from alignkit.data import Branches, Mapped
from alignkit.models import decide_shared_prompt, fused_logps
from alignkit_dpo.pairs import Collator, Pair, inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORWARD = ("input_ids", "attention_mask", "position_ids", "labels")  # arguments of the model


def answer_logps(model: Any, batch: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor | None]:
    """The log-probability of each answer, summed over its tokens, [N], and the auxiliary loss of experts, if any."""
    outputs = fused_logps(model, {**{name: batch[name] for name in FORWARD if name in batch}, **more})
    logps = outputs.log_probs[batch["rows"][:, None], batch["columns"]]  # [N, A]
    return logps.masked_fill(~_is_token(batch), 0).sum(1), outputs.aux_loss


def shares_prompts(run: Run, policy: Any, pairs: Sequence[Pair], device: torch.device) -> bool:
    """Whether to compute a prompt once for all its answers (see :func:`alignkit.models.decide_shared_prompt`).

    A mixture of experts never does: its load-balancing loss takes a 2D mask of whole rows.
    """

    def token_logps(group: Branches, shared: bool) -> Tensor:
        collator = Collator(run.tokenizer.pad_token_id, tree=policy.dtype if shared else None)
        batch = {name: tensor.to(device) for name, tensor in inputs([group], collator).items()}
        arguments = {name: batch[name] for name in FORWARD if name in batch and name != "labels"}
        logits = policy(**arguments, use_cache=False).logits[batch["rows"][:, None], batch["columns"]]
        return logits.float().log_softmax(-1)[_is_token(batch)]  # [tokens, V]

    def group_of(pair: Pair) -> Branches:
        return Branches(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]])

    experts = hasattr(policy.config, "output_router_logits")
    return decide_shared_prompt(run, policy, Mapped(group_of, pairs), token_logps, device, supported=not experts)


def _is_token(batch: dict[str, Tensor]) -> Tensor:
    """A mask of ``columns``, [N, A]: True on an answer's tokens, False on padding."""
    import torch

    places = torch.arange(batch["columns"].shape[1], device=batch["columns"].device)
    return places < batch["lengths"][:, None]
