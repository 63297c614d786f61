"""The computed table of layouts, held to published sizes and to numbers worked out by hand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def scale(benchmarks: None) -> Any:
    return importlib.import_module("scale_computed")


def test_sizes_are_those_of_the_published_models(scale: Any) -> None:
    sizes = {"1.5B": 1_543_714_304, "3B": 3_212_749_824, "8B": 8_030_261_248, "32B": 32_763_876_352}
    assert {name: shape.weights for name, shape in scale.MODELS.items()} == {**sizes, "70B": 70_553_706_496}


@pytest.mark.parametrize("name", ["1.5B", "3B", "8B"])
def test_shapes_are_those_of_the_other_benchmarks(name: str, scale: Any) -> None:
    import peft

    kind, sizes = importlib.import_module("memory_shapes").SHAPES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**sizes))
    assert sum(p.numel() for p in model.parameters()) == scale.MODELS[name].weights
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == scale.MODELS[name].adapter(16)


def test_memory_of_full_training_by_hand(scale: Any) -> None:
    """8B: 4 bytes of weights, 4 of gradients and 8 of Adam each are 128.5 GB, 64.2 GB on each of two cards.

    FSDP2 gathers the embeddings and the head, 4.203 GB, and two layers, 1.745 GB. The inputs of 32 layers are 1.074 GB,
    a layer that is recomputed 0.805 GB, and the logits 1.074 GB.
    """
    by_hand = 64.242 + 4.203 + 1.745 + 1.074 + 0.805 + 1.074

    computed = scale.memory(scale.MODELS["8B"], "full", "sft", "fsdp2", 2, scale.Setting())
    assert computed / 1e9 == pytest.approx(1.03 * by_hand + 0.698, rel=1e-4)


def test_communication_by_hand(scale: Any) -> None:
    """8B on two cards: DDP sends each gradient once and receives it once, 32.1 GB; FSDP2 half of the weights twice
    and of the gradients once, 48.2 GB. A step of 4,096 tokens takes 0.66 s, and 300 GB/s send 48.2 GB in 0.16 s."""
    shape, setting = scale.MODELS["8B"], scale.Setting()

    assert scale.communication(shape, "full", "sft", "ddp", 2, setting) == 4 * 8_030_261_248
    assert scale.communication(shape, "full", "sft", "fsdp2", 2, setting) == 0.5 * 3 * 4 * 8_030_261_248
    assert scale.communication(shape, "lora", "sft", "ddp", 2, setting) == 4 * 41_943_040
    assert scale.ratio(shape, "full", "sft", "fsdp2", 2, setting) == pytest.approx(0.1606 / 0.6578, rel=1e-3)


def test_layouts_end_where_the_arithmetic_says(scale: Any) -> None:
    models, setting = scale.MODELS, scale.Setting()

    assert scale.fewest(models["8B"], "full", "sft", "ddp", setting) is None  # 16 bytes a weight: 128.5 GB
    assert scale.fewest(models["70B"], "lora", "sft", "ddp", setting) is None  # the base alone is 141 GB
    assert scale.fewest(models["70B"], "lora", "sft", "fsdp2", setting) == 4
    assert scale.fewest(models["70B"], "lora", "ppo", "fsdp2", setting) is None  # it samples from the whole base
    assert scale.fewest(models["70B"], "qlora", "sft", "ddp", setting) == 1  # 36 GB of base in 4 bits


@pytest.mark.parametrize("card", [80, 24])
def test_the_table_in_the_docs_is_what_the_script_prints(card: int, scale: Any) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    setting = scale.Setting(**(scale.SMALL_CARD if card == 24 else {}))
    for stage in scale.LAYOUTS:
        for line in scale.table(stage, setting).splitlines():
            assert re.sub(r" +", " ", line) in page
