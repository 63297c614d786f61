"""On a CPU, the attention of short rows is trained by plain matrix products, with the same results to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.models import short_attention
from alignkit.models.roles import Member, Roles
from alignkit.models.sequences import Sequences

ROWS = [list(range(5, 25)), list(range(7, 20))], [list(range(30, 45)), list(range(50, 54))]


def roles_of(tiny_model: Callable[..., Path]) -> Roles:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    return Roles({"policy": Member(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")), "default")})


def trained(roles: Roles, bf16: bool) -> tuple[set[bool], torch.Tensor]:
    """Whether torch's fused kernel was allowed in the layers, and the gradient of the log-probabilities' sum."""
    allowed: set[bool] = set()
    layer = roles.members["policy"].model.base_model.model.model.layers[1].mlp
    hook = layer.register_forward_pre_hook(lambda *_: allowed.add(torch.backends.cuda.flash_sdp_enabled()))
    roles.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logps = roles(Sequences.of(*ROWS, 0, "cpu"), ("policy",))["policy"].logps
    logps.sum().backward()
    hook.remove()
    return allowed, torch.cat([p.grad.flatten() for p in roles.parameters() if p.grad is not None])


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_in_bf16_are_close_to_those_in_fp32(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    roles = roles_of(tiny_model).train()
    if recomputed:
        roles.gradient_checkpointing_enable()
    fused, exact = trained(roles, bf16=False)
    plain, short = trained(roles, bf16=True)
    monkeypatch.setattr(short_attention, "SHORT", 34)  # the longest row has 35 tokens
    also_fused, long = trained(roles, bf16=True)

    assert fused == also_fused == {True}
    assert plain == {False}
    assert (short - exact).norm() < 0.1 * exact.norm()
    assert (long - exact).norm() < 0.1 * exact.norm()


def test_plain_products_round_less_than_the_fused_kernel() -> None:
    torch.manual_seed(0)
    states, mask = torch.randn(4, 2, 3, 40, 16).bfloat16(), torch.ones(40, 40).tril().bool()  # q, k, v, gradient

    def gradients(dtype: torch.dtype, plain: bool) -> torch.Tensor:
        q, k, v, gradient = (one.to(dtype).clone() for one in states)
        leaves = [one.requires_grad_() for one in (q, k, v)]
        with short_attention.plain_products(plain):
            torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask).backward(gradient)
        return torch.stack([one.grad.double() for one in leaves])  # type: ignore[union-attr]

    exact = gradients(torch.float64, plain=True)
    plain, fused = (gradients(torch.bfloat16, kind) - exact for kind in (True, False))
    assert plain.norm() <= fused.norm() < 0.01 * exact.norm()


def test_forwards_without_gradients_use_the_fused_kernel() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        assert short_attention.plain_products_are_faster(ids)
        with torch.no_grad():
            assert not short_attention.plain_products_are_faster(ids)
