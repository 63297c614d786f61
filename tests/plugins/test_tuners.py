"""full, lora and qlora: what is trained, what is left alone, and that each setting acts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alignkit.cli import main
from alignkit.config import resolve
from alignkit.models import pretrained
from alignkit.registry import Registry

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def tuned(folder: Path, name: str, **table: Any) -> Any:
    """A model as a run makes it, in fp32."""
    tuner, config = resolve(Registry(), {"plugins": ["sft"], "tuner": {"name": name, **table}}, {}).tuner
    model = pretrained.load(str(folder), {"dtype": torch.float32, **tuner.load(config, torch.float32)})
    torch.manual_seed(0)
    return tuner.wrap(config, model, "policy")


def test_full_trains_everything_in_fp32(tiny_model: Callable[..., Path]) -> None:
    model = tuned(tiny_model(), "full")

    assert all(p.requires_grad and p.dtype is torch.float32 for p in model.parameters())


def test_full_can_train_in_bf16(tiny_model: Callable[..., Path]) -> None:
    assert tuned(tiny_model(), "full", dtype="bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
def test_adapters_alone_are_trained_in_fp32_and_start_as_the_base(
    tiny_model: Callable[..., Path], name: str, architecture: str
) -> None:
    model = tuned(tiny_model(architecture), name).eval()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]

    assert trained
    assert all("lora_" in n for n in trained)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), model.disable_adapter():
        base = model(IDS.to(model.device)).logits
    torch.testing.assert_close(model(IDS.to(model.device)).logits, base)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_training_an_adapter_leaves_the_base_alone(tiny_model: Callable[..., Path], name: str) -> None:
    model = tuned(tiny_model(), name)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = IDS.to(model.device)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.requires_grad)


def test_qlora_holds_linear_layers_in_four_bits(tiny_model: Callable[..., Path]) -> None:
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in tuned(tiny_model(), "qlora").modules() if isinstance(m, Linear4bit)]

    assert len(layers) == 2 * 7  # two blocks of q, k, v, o, gate, up, down
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)


def test_double_quantization_can_be_switched_off(tiny_model: Callable[..., Path]) -> None:
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in tuned(tiny_model(), "qlora", double_quant=False).modules() if isinstance(m, Linear4bit)]

    assert not any(m.weight.quant_state.nested for m in layers)


@pytest.fixture
def four_bits(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """``four_bits("llama")``: a folder with a model that was saved in four bits, as ``...-bnb-4bit`` on the hub."""

    def make(architecture: str) -> Path:
        folder = tmp_path / f"{architecture}-bnb-4bit"
        shutil.copytree(tiny_model(architecture), folder)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16).save_pretrained(
            folder
        )
        return folder

    return make


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(("name", "quantized"), [("qlora", False), ("lora", True), ("qlora", True)])
def test_gradients_through_four_bits_are_right_after_sampling(
    tiny_model: Callable[..., Path], four_bits: Callable[[str], Path], architecture: str, name: str, quantized: bool
) -> None:
    """bitsandbytes repacks weights in a forward without gradients on CPUs with AVX512-BF16, and breaks training."""
    from bitsandbytes.nn import Linear4bit

    folder = (four_bits if quantized else tiny_model)(architecture)

    def gradient(sample_first: bool) -> torch.Tensor:
        tuner, config = resolve(Registry(), {"plugins": ["sft"], "tuner": {"name": name}}, {}).tuner
        model: Any = pretrained.load(str(folder), {"dtype": torch.bfloat16, **tuner.load(config, torch.bfloat16)})
        torch.manual_seed(0)
        model = tuner.wrap(config, model, "policy")
        assert any(isinstance(m, Linear4bit) for m in model.modules())
        assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1)
        ids = IDS.to(model.device)
        if sample_first:
            model.eval()
            with torch.no_grad():
                model(ids)
            model.train()
        with torch.autocast(model.device.type, torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradient(sample_first=True), gradient(sample_first=False))


def test_lora_on_a_model_of_four_bits_trains_and_full_is_refused(
    run_stage: Callable[..., Path], four_bits: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = four_bits("llama")
    given = ["--model", str(folder), "train.learning_rate=0.01"]
    metrics = json.loads((run_stage("sft", "--plugin", "lora", *given) / "alignkit.json").read_text())["metrics"]

    assert metrics["eval_loss"] < 7
    refused = rf"error: {folder} is quantized \(bitsandbytes\), and tuner 'full' would train its weights"
    with pytest.raises(AssertionError, match=refused):
        run_stage("sft", "--plugin", "full", *given, "--overwrite")
    capsys.readouterr()
    assert main(["check", "--plugin", "sft", "--plugin", "full", "--model", str(folder)]) == 2
    assert "is quantized (bitsandbytes)" in capsys.readouterr().err


def test_dora_trains_magnitudes(tiny_model: Callable[..., Path]) -> None:
    names = [n for n, p in tuned(tiny_model(), "lora", use_dora=True).named_parameters() if p.requires_grad]

    assert any("lora_magnitude_vector" in n for n in names)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_rank_stabilized_lora_scales_by_the_root(tiny_model: Callable[..., Path], rslora: bool, scale: float) -> None:
    model = tuned(tiny_model(), "lora", use_rslora=rslora)

    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {scale}


def test_rank_and_targets_act(tiny_model: Callable[..., Path]) -> None:
    model = tuned(tiny_model(), "lora", r=3, target_modules=["q_proj"])
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "lora_A" in n}

    assert shapes == {(3, 64)}


@pytest.mark.parametrize("name", ["full", "lora", "sft"])
def test_nothing_but_qlora_and_the_8_bit_optimizers_names_bitsandbytes(name: str) -> None:
    registry = Registry()
    needing = {c.name for kind in ("stage", "tuner", "optimizer") for c in registry.all(kind) if c.requires}

    assert needing == {"qlora", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"}
