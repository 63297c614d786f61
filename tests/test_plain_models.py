"""A PEFT model as plain weights, and computing in fp32 with weights of 16 or 4 bits: both change no output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from alignkit import AlignkitError
from alignkit.models import plain, pretrained
from alignkit.models.fp32 import computing_in_fp32

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


def reopened(model: Any, folder: Path) -> torch.Tensor:
    """The logits of a model that is saved and opened again by plain Transformers."""
    model.save_pretrained(folder / "merged")
    return logits(AutoModelForCausalLM.from_pretrained(folder / "merged").eval())


def adapted(base: Any, config: Any, folder: Path) -> Any:
    """A PEFT model whose trained weights are far from their start, saved in ``folder``."""
    model = peft.get_peft_model(base, config).eval()
    before = logits(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    model.save_pretrained(str(folder))
    return model


TUNERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(target_modules=LINEAR, use_dora=True),
    "rslora": lambda: peft.LoraConfig(target_modules=LINEAR, use_rslora=True, rank_pattern={"q_proj": 2}),
    "lora of embeddings": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "lora of the head": lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"]),
    "saved embeddings": lambda: peft.LoraConfig(target_modules=LINEAR, modules_to_save=["embed_tokens"]),
    "saved head": lambda: peft.LoraConfig(target_modules=LINEAR, modules_to_save=["lm_head"]),
    "both saved": lambda: peft.LoraConfig(target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"]),
    "saved norms": lambda: peft.LoraConfig(target_modules=LINEAR, modules_to_save=["input_layernorm", "norm"]),
    "new tokens": lambda: peft.LoraConfig(target_modules=LINEAR, trainable_token_indices=[5, 7]),
    "oft": lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(target_modules=LINEAR),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LINEAR, total_step=10),
    "hra": lambda: peft.HRAConfig(target_modules=LINEAR),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, on tied weights that an adapter changes
@pytest.mark.parametrize("architecture", ["llama", "gemma"])  # the embeddings of the second are tied to its head
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_merged_model_has_the_logits_of_the_peft_model(
    tiny_model: Callable[..., Path], tuner: str, architecture: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    expected = logits(adapted(copy.deepcopy(base), TUNERS[tuner](), tmp_path / "adapter"))

    merged = plain.merge(base, tmp_path / "adapter", torch.float32)
    torch.testing.assert_close(reopened(merged, tmp_path), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_stay_tied_unless_the_adapter_changed_one_of_them(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def tied(config: peft.LoraConfig, name: str) -> bool:
        base = AutoModelForCausalLM.from_pretrained(tiny_model("gemma"))
        adapted(base, config, tmp_path / name)
        merged = plain.merge(AutoModelForCausalLM.from_pretrained(tiny_model("gemma")), tmp_path / name, torch.bfloat16)
        merged.save_pretrained(tmp_path / f"{name}-merged")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        assert model.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
        return bool(model.config.tie_word_embeddings)

    assert tied(peft.LoraConfig(target_modules=LINEAR), "linear")
    assert not tied(peft.LoraConfig(target_modules=["embed_tokens"]), "embeddings")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
# GPT-2's layers are transposed, Qwen 2's have biases
def test_a_4_bit_base_is_dequantized_before_the_adapter_is_merged(
    tiny_model: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    def open_base() -> Any:
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return pretrained.load(str(tiny_model(architecture)), {"dtype": torch.float32, "quantization_config": four})

    expected = logits(adapted(open_base(), peft.LoraConfig(target_modules="all-linear"), tmp_path / "adapter"))
    merged = plain.merge(open_base().eval(), tmp_path / "adapter", torch.float32)

    torch.testing.assert_close(reopened(merged, tmp_path), expected, atol=2e-5, rtol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


def test_an_adapter_that_peft_cannot_merge_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    adapted(copy.deepcopy(base), peft.LoraConfig(target_modules=LINEAR, lora_bias=True), tmp_path)

    with pytest.raises(AlignkitError, match=r"the LORA adapter in .* cannot be merged: .* the base layer has no bias"):
        plain.merge(base, tmp_path, torch.float32)


def test_a_reward_model_keeps_its_head_in_fp32(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def open_base() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=1, pad_token_id=None)

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=LINEAR, modules_to_save=["score"])
    model = adapted(open_base(), config, tmp_path / "adapter")
    head = model.get_base_model().score.modules_to_save["default"].weight
    merged = plain.merge(open_base(), tmp_path / "adapter", torch.bfloat16)

    assert torch.equal(merged.score.weight, head)
    assert merged.model.embed_tokens.weight.dtype is torch.bfloat16


def test_weights_too_large_for_fp16_are_refused(tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5

    with pytest.raises(AlignkitError, match=r"model.norm.weight has values up to 1e\+05, which float16 cannot"):
        plain.round_parameters(model.named_modules(), torch.float16)
    plain.round_parameters(model.named_modules(), torch.bfloat16)
    assert model.model.norm.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "qwen2", "mixtral"])
def test_a_model_in_bf16_computes_in_fp32_with_its_own_weights(
    tiny_model: Callable[..., Path], architecture: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.bfloat16)
    expected = logits(copy.deepcopy(model).float())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rounded = logits(model)
    with computing_in_fp32(model):
        torch.testing.assert_close(model(IDS).logits, expected)

    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), rounded)  # as before
    assert rounded.dtype is torch.bfloat16


def test_a_4_bit_model_computes_in_fp32_with_the_weights_of_its_own_format(tiny_model: Callable[..., Path]) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = pretrained.load(str(tiny_model()), {"dtype": torch.bfloat16, "quantization_config": four}).eval()
    dense = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16).float()
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            import bitsandbytes

            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data = weight.to(torch.bfloat16).float().cpu()
    with computing_in_fp32(model):
        torch.testing.assert_close(logits(model), logits(dense))
