"""When a stage computes a prompt once for all its answers: by setting, architecture, agreement and saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit import ConfigError
from alignkit.data.encoding import Branches
from alignkit.models import prompt_trees, shared_prompt

LONG = [Branches(list(range(60)), [[1, 2], [3, 4, 5], [6]]), Branches([7] * 40, [[8], [9, 10]])]
SHORT = [Branches([7], [[8] * 30, [9] * 30])]  # a tree's mask costs more than the one token that it saves


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.data *= 4  # as it is initialized, attention has hardly an effect
    return model


def decided(model: Any, wanted: bool | None, groups: list[Branches] = LONG, wrong: bool = False, **more: Any) -> Any:
    """Whether prompts are shared, and the lines that are printed."""
    lines: list[str] = []
    component, config = SimpleNamespace(name="rm"), SimpleNamespace(shared_prompt=wanted)
    config = SimpleNamespace(stage=SimpleNamespace(component=component, config=config), model="tiny")
    run = SimpleNamespace(config=config, dtype=torch.float32, say=lines.append)

    def forward(group: Branches, shared: bool) -> torch.Tensor:
        inputs = (
            prompt_trees.collate_tree([group], 0, model.dtype) if shared else prompt_trees.collate_separate([group], 0)
        )
        ends = inputs.pop("ends")
        if wrong and shared:  # as a model that counts positions by itself
            del inputs["position_ids"]
        return model(**inputs).logits[ends[:, 0], ends[:, 1]]

    shared = shared_prompt.decide_shared_prompt(run, model, groups, forward, torch.device("cpu"), **more)
    assert model.training
    return shared, lines


def test_prompts_are_shared_where_that_is_exact_and_faster(model: Any) -> None:
    saved = 1 - 1 / prompt_trees.saving(LONG, model.config)
    line = f"shared prompt: each prompt is computed once for all its answers, which saves {saved:.0%} of the work"

    assert decided(model, None) == (True, [line])
    assert decided(model, True) == (True, [line])
    assert decided(model, False) == (False, [])


def test_prompts_are_not_shared_where_nothing_is_saved_unless_the_setting_is_true(model: Any) -> None:
    assert decided(model, None, SHORT) == (False, [])
    assert decided(model, True, SHORT)[0] is True


@pytest.mark.parametrize("reason", ["architecture", "stage", "forward"])
def test_prompts_are_not_shared_where_results_would_differ(model: Any, reason: str) -> None:
    if reason == "architecture":
        model.config.sliding_window = 8
    why: dict[str, Any] = {"stage": {"supported": False}, "forward": {"wrong": True}}.get(reason, {})

    assert decided(model, None, **why) == (False, [])
    with pytest.raises(
        ConfigError, match="rm.shared_prompt=true: with tiny, the results would differ .* false or null"
    ):
        decided(model, True, **why)
