"""The memory table of benchmarks/ppo_memory.py: what it computes is what real tensors and states take."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory_computed")


def options(**more: Any) -> argparse.Namespace:
    given = {"optimizer": "adamw_8bit", "microbatch": 2, "length": 64, "response": 32, "sampled": 4, "gpu_memory": 24}
    return argparse.Namespace(
        **{**given, "gradient_checkpointing": True, "bf16_weights": False, "value": "adapter", **more}
    )


def test_nf4_takes_the_bytes_that_are_computed(memory: Any) -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(256, 512, bias=False, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(512, 256), requires_grad=False, quant_type="nf4")
    layer.to("cpu")
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]

    assert memory.nf4_bytes(512 * 256) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_states_take_the_bytes_that_are_computed(memory: Any, optimizer: str) -> None:
    import bitsandbytes as bnb

    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (100, 4096, 5000)]
    cls = torch.optim.AdamW if optimizer == "adamw" else bnb.optim.AdamW8bit
    made = cls(parameters, lr=1e-3)
    sum(p.sum() for p in parameters).backward()
    made.step()
    states = [s for state in made.state.values() for name, s in state.items() if "qmap" not in name and name != "step"]

    assert memory.state_bytes([p.numel() for p in parameters], optimizer) == sum(s.nbytes for s in states)


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_tensors_without_data_are_counted_like_those_with_data(memory: Any, tuner: str, checkpointing: bool) -> None:
    how = options(gradient_checkpointing=checkpointing)

    without, with_data = (
        dataclasses.astuple(make("tiny", tuner, how)) for make in (memory.compute, memory.with_tensors)
    )
    assert without == pytest.approx(with_data, rel=0.05)  # without data, some operations make more tensors


def test_the_parts_are_those_of_the_model(memory: Any) -> None:
    model = memory.transformers.AutoModelForCausalLM.from_config(memory.config_of("tiny"), dtype=torch.bfloat16)
    lora = memory.lora.wrap(memory.lora.LoraConfig(), model, "policy")
    adapter = sum(p.nbytes for p in lora.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in lora.parameters()) - adapter
    parts = memory.compute("tiny", "lora", options(optimizer="adamw"))

    assert parts.weights == base
    assert parts.adapters == 4 * adapter + 3 * 4 * 128
    assert parts.optimizer == 2 * 2 * adapter
    assert parts.training > 2 * adapter  # the gradients at least


def test_checkpointing_and_smaller_batches_take_less(memory: Any) -> None:
    with_it, without = (
        memory.compute("tiny", "lora", options(gradient_checkpointing=how, length=128)) for how in (True, False)
    )
    fewer = memory.compute("tiny", "lora", options(length=128, sampled=2))

    head = memory.compute("tiny", "lora", options(length=128, value="head"))

    assert with_it.training < without.training
    assert head.optimizer < with_it.optimizer
    assert head.training < with_it.training
    assert fewer.sampling < with_it.sampling


@pytest.mark.parametrize("tuner", ["lora", "qlora"])
def test_what_is_measured_on_a_gpu_runs(memory: Any, tuner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    how = options(optimizer="adamw", response=8)

    peak = importlib.import_module("memory_measured").measure("tiny", tuner, how)
    assert (peak > 0) == torch.cuda.is_available()


def test_logits_are_as_many_as_on_a_gpu_of_that_size(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from alignkit.models import token_logps

    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    at_a_time = token_logps.logits_at_a_time(torch.device("cuda"))
    small, large = (memory.compute("tiny", "lora", options(gpu_memory=g, response=60, microbatch=8)) for g in (4, 80))

    assert memory.logits_of(options(gpu_memory=80)) == at_a_time
    assert memory.logits_of(options(gpu_memory=1)) == token_logps.LOGITS
    assert small.training < large.training
