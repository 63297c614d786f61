"""What is trained, and that every role of PPO is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alignkit_ia3 import Ia3Config, wrap
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scales_alone_are_trained_and_start_at_the_base(tiny_model: Callable[..., Path], architecture: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = base(ids).logits
    model = wrap(Ia3Config(), base, "policy").eval()

    assert all("ia3_" in name for name, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(model(ids).logits, expected)


def test_layers_can_be_named(tiny_model: Callable[..., Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = wrap(Ia3Config(target_modules=["q_proj"], feedforward_modules=[]), base, "policy")

    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj"}


def test_ppo_runs_on_it(run_stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=4", "train.bf16=false"]
    run = run_stage("ppo", "--plugin", "ia3", "train.learning_rate=0.01", *small)
    first = next(log for line in (run / "metrics.jsonl").read_text().splitlines() if "kl" in (log := json.loads(line)))
    weights, sft = (load_file(folder / "adapter_model.safetensors") for folder in (run, run.with_name("sft")))

    assert first["kl"] == 0
    assert "policy, reference, reward, value on one base" in capsys.readouterr().out
    assert weights.keys() == sft.keys()
    assert not any(torch.equal(weights[name], sft[name]) for name in weights)


def test_alignkit_finds_nothing_wrong_with_it(check_plugin: Callable[[str], None]) -> None:
    check_plugin("ia3")
