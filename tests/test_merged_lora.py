"""Decoding with merged weights gives the adapter's answers, touches no weight, and says nothing exact in bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_forward import IDS, adapted

from alignkit import AlignkitError, Sampling
from alignkit.generation import decode
from alignkit.models.lora_forward import lora_forward, merged_lora

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12]]
SAMPLING = Sampling(6, temperature=1.0, stop_ids=(), samples=2)


def answers(model: Any, merged: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        return decode.decode(model, PROMPTS, SAMPLING, merged=merged)


def test_in_fp32_merged_answers_and_log_probabilities_are_those_of_the_adapter(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected, merged = answers(model, merged=False), answers(model, merged=True)

    assert merged == expected
    torch.testing.assert_close(torch.tensor(merged.logps), torch.tensor(expected.logps))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    with model.disable_adapter():
        assert answers(model, merged=False) != expected  # the adapter matters


def test_each_layer_is_a_single_product(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model, torch.bfloat16)

    def products(context: Any) -> int:
        with torch.no_grad(), context, torch.profiler.profile() as profile:
            model(input_ids=IDS)
        names = ("aten::mm", "aten::addmm", "aten::addmm_")
        return sum(event.count for event in profile.key_averages() if event.key in names)

    adapters = sum(hasattr(module, "lora_A") for module in model.modules())
    assert products(lora_forward(model)) - products(merged_lora(model)) == 2 * adapters
    assert products(contextlib.nullcontext()) > products(merged_lora(model))


def test_in_bf16_there_are_no_log_probabilities(tiny_model: Callable[..., Path]) -> None:
    """A new adapter is 0, so that they agree in the first iteration, and rounding is what differs later."""
    model = adapted(tiny_model, torch.bfloat16)

    assert answers(model, merged=True, dtype=torch.bfloat16).logps is None
    assert answers(model, merged=False, dtype=torch.bfloat16).logps is not None


def test_without_layers_to_merge_it_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model, use_dora=True)
    with pytest.raises(AlignkitError, match="set merge_lora=false"):
        answers(model, merged=True)
    assert not any("forward" in vars(module) for module in model.modules())
