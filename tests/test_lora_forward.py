"""LoRA layers in few operations compute what PEFT computes, and its gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.models import lora_forward as lora_module
from alignkit.models import peft_internals
from alignkit.models.adapters import copy_adapter
from alignkit.models.lora_forward import lora_forward
from alignkit.models.roles import Member, Roles
from alignkit.models.sequences import Sequences

Gradients = dict[str, torch.Tensor]

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def adapted(tiny_model: Callable[..., Path], dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=dtype)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=12, init_lora_weights=False, **settings
    )
    return peft.get_peft_model(base, config).eval()


def computed(model: Any, fast: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Gradients]:
    """The last hidden states, and the gradients of a weighted sum of them."""
    model.zero_grad()
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    with lora_forward(model) if fast else contextlib.nullcontext(), autocast:
        hidden = model.base_model.model.model(input_ids=IDS).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def differences(ours: Gradients, exact: Gradients) -> list[float]:
    """Relative to the norm of each gradient."""
    return [float((ours[name] - exact[name]).norm() / exact[name].norm()) for name in exact]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_in_fp32_outputs_and_gradients_are_those_of_peft(
    tiny_model: Callable[..., Path], settings: dict[str, Any]
) -> None:
    model = adapted(tiny_model, **settings)
    expected, exact = computed(model, fast=False)
    hidden, gradients = computed(model, fast=True)

    torch.testing.assert_close(hidden, expected)
    assert gradients.keys() == exact.keys()
    assert {name for name in exact if "lora_A" in name}
    assert max(differences(gradients, exact)) < 1e-4


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_under_autocast_gradients_are_as_close_to_those_of_fp32_as_pefts(
    tiny_model: Callable[..., Path], base: torch.dtype
) -> None:
    bf16 = torch.bfloat16
    reference, exact = computed(adapted(tiny_model), fast=False)
    model = adapted(tiny_model, base)
    expected, of_peft = computed(model, fast=False, dtype=bf16)
    hidden, gradients = computed(model, fast=True, dtype=bf16)

    assert hidden.dtype is expected.dtype
    assert (hidden - reference).norm() < 1.1 * (expected - reference).norm() < 0.05 * reference.norm()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    ours, theirs = sorted(differences(gradients, exact)), sorted(differences(of_peft, exact))
    assert ours[len(ours) // 2] < 1.1 * theirs[len(theirs) // 2] < 0.05
    assert ours[-1] < 1.5 * theirs[-1]


def test_with_and_without_gradients_the_same_is_computed_bit_for_bit(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model, torch.bfloat16)
    hidden, _ = computed(model, fast=True, dtype=torch.bfloat16)
    with torch.no_grad(), lora_forward(model), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.base_model.model.model(input_ids=IDS).last_hidden_state, hidden)


@pytest.mark.parametrize("bias", [False, True])  # with a bias, what bitsandbytes returns is a view
def test_on_a_4_bit_base_gradients_are_those_of_peft(tiny_model: Callable[..., Path], bias: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    for layer in base.model.layers:
        plain = layer.mlp.gate_proj
        quantized = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4"
        )
        quantized.load_state_dict({**quantized.state_dict(), **plain.state_dict()})
        quantized.support_avx512bf16_for_cpu = False
        layer.mlp.gate_proj = quantized.to("cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["gate_proj"], init_lora_weights=False))
    expected, exact = computed(model, fast=False)
    hidden, gradients = computed(model, fast=True)

    torch.testing.assert_close(hidden, expected)
    assert gradients.keys() == exact.keys()
    assert max(differences(gradients, exact)) < 1e-4


def test_on_an_8_bit_base_gradients_are_those_of_peft(tiny_model: Callable[..., Path]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    for layer in base.model.layers:
        plain = layer.mlp.gate_proj
        quantized = bitsandbytes.nn.Linear8bitLt(
            plain.in_features, plain.out_features, bias=True, has_fp16_weights=False
        )
        quantized.load_state_dict(plain.state_dict(), strict=False)
        layer.mlp.gate_proj = quantized.to("cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["gate_proj"], init_lora_weights=False))
    expected, exact = computed(model, fast=False)
    hidden, gradients = computed(model, fast=True)

    torch.testing.assert_close(hidden, expected)
    assert max(differences(gradients, exact)) < 1e-4


@pytest.mark.parametrize("recomputed", [False, True])
def test_roles_train_their_own_adapter_through_a_frozen_base(tiny_model: Callable[..., Path], recomputed: bool) -> None:
    model = adapted(tiny_model)
    copy_adapter(model, "default", "role_value", trained=True)
    copy_adapter(model, "default", "frozen", trained=False)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    roles = Roles({"policy": Member(model, "default"), "value": Member(model, "role_value", head)})
    sequences = Sequences.of([[5, 6], [7]], [[8, 9], [10, 11]], 0, "cpu")
    model.train()
    if recomputed:
        roles.gradient_checkpointing_enable()
    outputs = roles(sequences, ("policy", "value"))
    (outputs["policy"].logps.sum() + outputs["value"].sum()).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    model.base_model.model.gradient_checkpointing_disable()
    with peft_internals.use_adapter(model, "default"):
        logits = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask).logits
    logps = logits.flatten(0, 1)[sequences.before].log_softmax(-1).gather(1, sequences.targets[:, None])
    with peft_internals.use_adapter(model, "role_value"):
        hidden = model.base_model.model.model(
            input_ids=sequences.input_ids, attention_mask=sequences.attention_mask
        ).last_hidden_state
    (logps.sum() + head(hidden.flatten(0, 1)[sequences.before]).sum()).backward()
    exact = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert ours.keys() == exact.keys()
    assert {adapter for name in ours for adapter in ("default", "role_value", "frozen") if adapter in name} == {
        "default",
        "role_value",
    }
    assert max(differences(ours, exact)) < 1e-4


def test_adapters_are_cast_once_while_weights_are_constant_and_again_after(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_model, torch.bfloat16)
    copy_adapter(model, "default", "other", trained=False)
    roles = Roles({"policy": Member(model, "default"), "reference": Member(model, "other")})
    sequences = Sequences.of([[5, 6], [7]], [[8, 9], [10, 11]], 0, "cpu")
    made: list[Any] = []
    real = lora_module._Forward
    monkeypatch.setattr(lora_module, "_Forward", lambda *arguments: made.append(arguments) or real(*arguments))

    @torch.no_grad()
    def logps() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [output.logps for output in roles(sequences, ("policy", "reference")).values()]

    expected, layers = logps(), len(peft_internals.plain_lora_layers(model))
    made.clear()
    with roles.constant_weights():
        assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(logps(), expected, strict=True))
    assert len(made) == 2 * layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.zero_()
    policy, reference = logps()
    assert torch.equal(reference, expected[1])
    assert not torch.equal(policy, expected[0])


def test_roles_give_the_same_log_probabilities_with_and_without_gradients_bit_for_bit(
    tiny_model: Callable[..., Path],
) -> None:
    """PPO's first step checks it: in bf16, a different order of operations would look like another policy."""
    roles = Roles({"policy": Member(adapted(tiny_model, torch.bfloat16), "default")})
    sequences = Sequences.of([list(range(5, 25)), [7, 8]], [list(range(30, 45)), [10, 11]], 0, "cpu")

    def logps() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return roles(sequences, ("policy",))["policy"].logps

    with torch.no_grad():
        expected = logps()
    assert torch.equal(logps(), expected)


def test_a_model_that_ran_before_it_was_adapted_switches_adapters(tiny_model: Callable[..., Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    with torch.no_grad(), lora_forward(base):
        expected = base(input_ids=IDS).logits
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        with peft_internals.use_adapter(model, None):
            assert torch.equal(model(input_ids=IDS).logits, expected)


def test_hooks_of_a_base_layer_keep_the_output_that_they_saw(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model)
    expected, exact = computed(model, fast=False)
    first, second = [layer.base_layer for layer in model.modules() if peft_internals.plain_lora(layer)][-2:]
    seen, copies, gradients_seen = list[torch.Tensor](), list[torch.Tensor](), list[Any]()

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen.append(output)
        copies.append(output.detach().clone())

    first.register_forward_hook(keep)
    second.register_full_backward_hook(lambda module, of_inputs, of_outputs: gradients_seen.append(of_outputs))
    hidden, gradients = computed(model, fast=True)

    assert torch.equal(seen[0], copies[0])
    assert len(gradients_seen) == 1
    torch.testing.assert_close(hidden, expected)
    assert max(differences(gradients, exact)) < 1e-5
