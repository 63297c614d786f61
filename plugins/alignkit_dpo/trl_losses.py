"""TRL's losses by its own code, as functions of :class:`alignkit.PreferenceLogps`.

TRL computes its losses inside of a method of its trainer, beside the forward. Here that method is called with a model
that says what is known already. It leans on TRL's insides, and nothing else in this plugin does.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from alignkit import LossOutput, PreferenceLogps


def named(loss_type: str) -> Callable[[Any], Callable[[PreferenceLogps], LossOutput]]:
    """What builds TRL's ``loss_type`` from its config, whose fields are those of ``trl.DPOConfig``."""

    def build(config: Any) -> Callable[[PreferenceLogps], LossOutput]:
        settings = dataclasses.asdict(config)
        return lambda batch: LossOutput(loss(loss_type, settings, batch))

    return build


def loss(loss_type: str, settings: dict[str, Any], batch: PreferenceLogps) -> Any:
    """The loss of TRL's trainer on one batch, a scalar."""
    import torch
    import trl

    sums, lengths = torch.cat([batch.chosen, batch.rejected]), torch.cat([batch.chosen_length, batch.rejected_length])
    mask = torch.arange(int(lengths.max()), device=sums.device) < lengths[:, None]
    # the method adds up an answer's tokens: the first has the whole sum
    logps = torch.nn.functional.pad(sums[:, None], (0, mask.shape[1] - 1))
    nothing = torch.zeros_like(logps)
    no = nothing[: len(batch.chosen), 0]
    completion = torch.nn.functional.pad(mask, (1, 0)).long()  # the first token is the prompt's
    inputs = {
        "input_ids": completion,
        "attention_mask": completion,
        "completion_mask": completion,
        "ref_chosen_logps": no if batch.ref_chosen is None else batch.ref_chosen,
        "ref_rejected_logps": no if batch.ref_rejected is None else batch.ref_rejected,
    }
    said = SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=mask)
    arguments = trl.DPOConfig.__dataclass_fields__
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device=sums.device, gather=_same, gather_for_metrics=_same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=settings.get("beta", arguments["beta"].default),
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=False,
        args=SimpleNamespace(**settings),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: said, inputs, False)


def _same(value: Any) -> Any:
    return value
