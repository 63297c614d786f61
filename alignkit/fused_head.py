"""TRL's fused language-model head, which gives log-probabilities without ever building the logits.

``trl.trainer.add_fused_lm_head`` projects positions through the head in tiles. Everything here that leans on TRL's
insides is in this module, so that a release of TRL changes one file.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import trl.trainer.utils


def forward(model: Any, inputs: dict[str, Any]) -> Any:
    """``log_probs`` and ``is_top1`` [B, T-1] of next tokens that have a label, and ``label_mask`` of which have one.

    ``model`` must have been given the head by ``trl.trainer.add_fused_lm_head``, as TRL's trainers do; ``inputs`` holds
    ``input_ids`` and ``labels`` [B, T]. TRL applies the head where there is a label only where Triton runs, and scores
    every position elsewhere, to keep shapes constant for devices that compile. On a CPU the prompt's and the padding's
    share of the head is 30 % of a step, so here it is applied where there is a label on every device.
    """
    with mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: device.type != "neuron"):
        return model(**inputs, use_cache=False, fused_lm_head=True)
