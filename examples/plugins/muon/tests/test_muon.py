"""Which parameter goes where, what a step does to each, and that a state dict brings everything back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alignkit_muon.optimizer import Muon, split
from torch import nn

SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "weight_decay": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "momentum": 0.95,
    "ns_steps": 5,
}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"embed": nn.Embedding(30, 8), "up": nn.Linear(8, 64), "norm": nn.LayerNorm(8), "score": nn.Linear(8, 1)}
    )


def with_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)


def test_hidden_matrices_alone_are_orthogonalised(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    hidden = {id(p) for p in split(model)[0]}
    names = {n.split(".")[-2] for n, p in model.named_parameters() if id(p) in hidden}

    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_step_moves_matrices_alike_in_every_direction_and_the_rest_as_adamw() -> None:
    model, other = small(), small()
    with_gradients(model, 1)
    with_gradients(other, 1)
    before = model["up"].weight.detach().clone()
    Muon(model, **SETTINGS).step()
    vectors = [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": [other["embed"].weight, other["score"].weight]}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01).step()

    step = before * (1 - 0.1 * 0.01) - model["up"].weight
    sizes = torch.linalg.svdvals(step) / (0.1 * 0.2 * 64**0.5)  # of AdamW's root mean square, 0.2
    assert sizes.min() > 0.5
    assert sizes.max() < 1.5
    for name, p in model.named_parameters():
        if name != "up.weight":
            torch.testing.assert_close(p, other.get_parameter(name))


def test_going_on_from_a_state_dict_is_going_on() -> None:
    whole, half = small(), small()
    optimizer = Muon(whole, **SETTINGS)
    for seed in range(4):
        with_gradients(whole, seed)
        optimizer.step()
    first = Muon(half, **SETTINGS)
    for seed in range(2):
        with_gradients(half, seed)
        first.step()
    second = Muon(half, **{**SETTINGS, "lr": 99.0})
    second.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        with_gradients(half, seed)
        second.step()

    assert all(torch.equal(p, half.get_parameter(n)) for n, p in whole.named_parameters())


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_run_uses_it_and_its_schedule_reaches_both_parts(run_stage: Callable[..., Path], tuner: str) -> None:
    run = run_stage("sft", "--plugin", "muon", "--plugin", tuner, "optimizer.momentum=0.9")
    state = torch.load(next(run.glob("checkpoints/checkpoint-2")) / "optimizer.pt", weights_only=True)
    rates = {group["lr"] for group in state["param_groups"]}

    assert json.loads((run / "alignkit.json").read_text())["config"]["optimizer"]["name"] == "muon"
    assert state["param_groups"][0]["momentum"] == 0.9
    assert len(rates) == 1
    assert rates.pop() < state["param_groups"][0]["initial_lr"]


def test_alignkit_finds_nothing_wrong_with_it(check_plugin: Callable[[str], None]) -> None:
    check_plugin("muon")
