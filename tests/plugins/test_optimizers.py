"""Optimizers by name: each is what it says, on what the Trainer calls groups, or says why it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from alignkit import ConfigError, NoConfig
from alignkit.registry import Registry


def arguments(tmp_path: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(tmp_path), use_cpu=True, learning_rate=0.5, adam_beta1=0.8, weight_decay=0.1, report_to="none", **more
    )


def build(name: str, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    component: Any = Registry().get("optimizer", name)
    made: tuple[Any, dict[str, Any]] = component.build(NoConfig(), args)
    return made


@pytest.mark.parametrize(("name", "cls"), [("adamw", "AdamW"), ("adamw_8bit", "AdamW"), ("adafactor", "Adafactor")])
def test_each_steps_with_the_rate_of_the_train_table(name: str, cls: str, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 128))
    optimizer_cls, kwargs = build(name, arguments(tmp_path))
    optimizer = optimizer_cls([weight], **kwargs)
    weight.sum().backward()
    optimizer.step()

    assert optimizer_cls.__name__ == cls
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not torch.equal(weight, torch.ones(64, 128))


def test_adamw_takes_its_betas_from_the_train_table(tmp_path: Path) -> None:
    assert build("adamw", arguments(tmp_path))[1]["betas"] == (0.8, 0.999)


def test_eight_bit_states_are_eight_bits(tmp_path: Path) -> None:
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()  # it knows weights that other tests want in 32 bits by their id
    weight = torch.nn.Parameter(torch.ones(64, 128))
    optimizer_cls, kwargs = build("adamw_8bit", arguments(tmp_path))
    optimizer = optimizer_cls([weight], **kwargs)
    weight.sum().backward()
    optimizer.step()

    assert optimizer.state[weight]["state1"].dtype is torch.uint8


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paging_needs_a_gpu_and_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' pages its states between GPU and CPU; this run is on cpu"):
        build(name, arguments(tmp_path))


def test_biases_and_norms_do_not_decay(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    args = arguments(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    optimizer = Trainer(model, args, optimizer_cls_and_kwargs=build("adamw", args)).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}

    assert {n: decay[id(p)] for n, p in model.named_parameters()} == {
        n: 0.0 if "bias" in n or "ln_" in n else 0.1 for n, _ in model.named_parameters()
    }
