"""Whether a model keeps the rows of a packed sequence apart, tried on the model itself.

TRL tells a model where rows begin by positions that start again at 0. Some architectures ignore positions, so that
every row sees those before it, and some do not take them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignkit import ConfigError
from alignkit.models import base_of, fused_logps, probing

if TYPE_CHECKING:
    from torch import Tensor


def check(trainer: Any) -> None:
    """Compare a short row that is packed behind two different others, and alone.

    Raises:
        ConfigError: it does not get the same log-probabilities each time.
    """
    import torch

    inner = base_of(trainer.model)

    def logps(*rows: list[int]) -> Tensor:
        """Of the last row's tokens, in the batch that the trainer makes of rows that are packed together."""
        ids = [token for row in rows for token in row]
        example = {"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}
        batch = trainer._prepare_inputs(trainer.data_collator([example]))
        return fused_logps(trainer.model, batch).log_probs[0, -len(rows[-1]) + 1 :].float()

    with probing(inner) as inputs:
        ids = inputs["input_ids"][0].tolist()
        row, former, other = ids[2:], ids, ids[::-1]
        try:
            packed, also_packed, alone = logps(former, row), logps(other, row), logps(row)
        except Exception:  # the model does not take positions
            apart = False
        else:
            rounding = 1e-4 if inner.dtype is torch.float32 else 2e-2
            apart = torch.allclose(packed, also_packed, rtol=1e-5) and torch.allclose(packed, alone, rtol=rounding)
    if not apart:
        raise ConfigError(
            f"sft.packing: {type(inner).__name__} does not keep the rows of a packed sequence apart. "
            "Set sft.packing=false"
        )
