"""The FLOPs that benchmarks/ppo_vs_trl.py prints."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_counter_sees_matrix_products_and_attention_of_both_passes(
    benchmark: Callable[[str], Any], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    rows, length, config = 2, 40, model.config
    monkeypatch.setattr(torch.nn.functional, "embedding", torch.nn.functional.embedding)  # restored after the test
    counter = benchmark("flops").Counter()

    counter.start()
    model(torch.ones(rows, length, dtype=torch.long)).logits.sum().backward()
    counted = counter.flops
    counter.stop()

    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    linear = 2 * weights * rows * length
    product = 2 * rows * config.num_attention_heads * length**2 * config.head_dim  # QK^T, for example
    attention = config.num_hidden_layers * product
    assert counted == pytest.approx(3 * linear + 7 * attention, rel=1e-4)
    assert counter.positions == rows * length


def test_the_counter_sees_products_that_are_added_in_place(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "embedding", torch.nn.functional.embedding)  # restored after the test
    counter = benchmark("flops").Counter()

    counter.start()
    torch.zeros(3, 5).addmm_(torch.ones(3, 2), torch.ones(2, 5))
    counted = counter.flops
    counter.stop()

    assert counted == 2 * 3 * 2 * 5


def test_flops_are_those_of_the_counted_iteration_for_the_positions_of_the_timed_ones(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, phases = benchmark("ppo_phases").Meter(), ("sampling", "scoring", "training")
    monkeypatch.setattr(benchmark("flops"), "matrix_rate", lambda *args: 4e9)

    def iteration(seconds: float, positions: int, flops: float) -> dict[str, float]:
        one = {"seconds": 3 * seconds, "tokens": 5.0}
        for phase in phases:
            one |= {f"seconds {phase}": seconds, f"positions {phase}": positions, f"FLOPs {phase}": flops}
        return one

    meter.timed = 3
    meter.iterations = [iteration(9, 900, 0), iteration(1, 100, 0), iteration(3, 300, 0), iteration(7, 50, 1e9)]
    numbers = meter.numbers(answers=10, dtype=torch.float32)
    assert numbers["seconds training"] == 2
    assert numbers["GFLOP training"] == pytest.approx(4)  # 200 positions of 20 MFLOPs
    assert numbers["share training"] == pytest.approx(0.5)
    assert numbers["share"] == pytest.approx(0.5)

    meter.iterations[3]["positions sampling"] = 40  # fewer than the tokens that were sampled
    numbers = meter.numbers(answers=10, dtype=torch.float32)
    assert math.isnan(numbers["GFLOP sampling"])
    assert math.isnan(numbers["share"])
    assert numbers["GFLOP scoring"] == pytest.approx(4)
