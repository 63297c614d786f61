"""The moving average of the policy's weights."""

from __future__ import annotations

import pytest
import torch

from alignkit.online import ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_moves_as_its_closed_form_says(dtype: torch.dtype) -> None:
    weight = torch.zeros(4, dtype=dtype)
    average = ema.start([("weight", weight)])
    weight.fill_(1)
    for _ in range(355):
        ema.update(average, [("weight", weight)], 0.992)

    assert average["weight"].dtype is torch.float32
    torch.testing.assert_close(average["weight"], torch.full((4,), 1 - 0.992**355), rtol=1e-4, atol=1e-5)
