"""Tests whether a model keeps the rows of a packed sequence apart.

TRL marks the beginning of each row by restarting the position ids at 0. Some architectures ignore position ids, so that
each row attends to the rows before it, and some do not accept any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignkit import ConfigError, one_line
from alignkit.models import base_of, fused_logps, probing

if TYPE_CHECKING:
    from torch import Tensor


def check(trainer: Any) -> None:
    """Compare the log-probabilities of a short row by itself and packed behind two different rows.

    Raises:
        ConfigError: they differ.
    """
    import torch
    from accelerate.utils import send_to_device  # type: ignore[import-untyped]

    inner = base_of(trainer.model)

    def logps(*rows: list[int]) -> Tensor:
        """Log-probabilities of the last row's tokens, when the trainer packs the rows."""
        ids = [token for row in rows for token in row]
        example = {"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}
        batch = send_to_device(trainer.data_collator([example]), inner.device)
        return fused_logps(trainer.model, batch).log_probs[0, -len(rows[-1]) + 1 :].float()

    with probing(inner) as inputs:
        ids = inputs["input_ids"][0].tolist()
        row, first, second, reason = ids[2:], ids, ids[::-1], ""
        try:
            packed, packed_behind_other, unpacked = logps(first, row), logps(second, row), logps(row)
        except Exception as error:  # such as a model that accepts no position ids
            separate, reason = False, f": its forward pass fails ({one_line(error)})"
        else:
            separate = torch.allclose(packed, packed_behind_other, rtol=1e-5)
            separate &= torch.allclose(packed, unpacked, rtol=1e-4 if inner.dtype is torch.float32 else 2e-2)
    if not separate:
        raise ConfigError(
            f"sft.packing: {type(inner).__name__} does not keep the rows of a packed sequence apart{reason}. "
            "Set sft.packing=false"
        )
