"""The SFT loss against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from alignkit import NoConfig, TokenLogps
from alignkit_sft.nll import build

nll = build(NoConfig())
LOGPS = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_it_is_the_mean_over_target_tokens() -> None:
    assert nll(TokenLogps(LOGPS, MASK, 3)).loss.item() == pytest.approx((1 + 2 + 4) / 3)


def test_masked_positions_do_not_count_whatever_they_hold() -> None:
    noisy = torch.where(MASK, LOGPS, torch.full_like(LOGPS, -99.0))

    assert nll(TokenLogps(noisy, MASK, 3)).loss.item() == pytest.approx(7 / 3)


def test_microbatches_of_a_step_add_up_to_the_step() -> None:
    whole = nll(TokenLogps(LOGPS, MASK, 3)).loss
    parts = [nll(TokenLogps(LOGPS[i : i + 1], MASK[i : i + 1], 3)).loss for i in range(2)]

    assert torch.stack(parts).sum() == pytest.approx(whole.item())
