"""Log-probabilities from hidden states: chunk by chunk, and with a gradient that needs no second softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from alignkit.models import token_logps
from alignkit.models.logit_form import LogitForm


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (1.0, 5.0), (0.3, 0.8)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("by_logp", "by_entropy"), [(1, 1), (1, 0), (0, 1)])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    scale: float, cap: float | None, trained: bool, by_logp: int, by_entropy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_logps, "LOGITS", 3 * 50)  # chunks of three positions
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).double().requires_grad_(trained)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    targets, weights = torch.randint(0, 50, (7,)), torch.randn(2, 7, dtype=torch.double)
    ours, plain = (torch.randn(7, 8, dtype=torch.double).requires_grad_() for _ in range(2))
    plain.data.copy_(ours.data)

    logps, entropy = token_logps.token_logps(model, ours, targets, 0.7, LogitForm(scale, cap))
    logits = head(plain) * scale
    expected = ((torch.tanh(logits / cap) * cap if cap else logits).float() / 0.7).log_softmax(-1)
    chosen, spread = expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(logps, chosen)
    torch.testing.assert_close(entropy, spread)

    def gradient(of: torch.Tensor, hidden: torch.Tensor, also: torch.Tensor) -> torch.Tensor:
        total = by_logp * (of * weights[0]).sum() + by_entropy * (also * weights[1]).sum()
        return torch.autograd.grad(total, hidden)[0]

    torch.testing.assert_close(gradient(logps, ours, entropy), gradient(chosen, plain, spread), rtol=1e-4, atol=1e-6)
