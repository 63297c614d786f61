"""What alignkit uses of other libraries' internals is still there and behaves as relied on.

A failure here means that a release of PEFT, TRL, Transformers, accelerate, torch or datasets changed something that is
not its public API. The message names the file to look at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from internals import load, used_by
from torch import nn
from transformers import core_model_loading

from alignkit.models import fused_head, peft_internals, torch_internals, transformers_internals
from alignkit.models.layers import decoder_layers

ROOT = Path(__file__).parents[1]

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_model: Callable[..., Path]) -> Any:
    """A model with the adapters ``default`` and ``other``: LoRA layers, a module saved whole, and trained tokens."""
    torch.manual_seed(0)
    config = {"target_modules": ["q_proj"], "init_lora_weights": False, "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(load(tiny_model), peft.LoraConfig(**config, trainable_token_indices=[5, 6]))
    model.add_adapter("other", peft.LoraConfig(**config, trainable_token_indices=[5, 6]))
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if ".default" in name or ".other" in name):
            parameter.add_(torch.randn_like(parameter))
        return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS).logits
    return output


@used_by("use_adapter in alignkit/models/peft_internals.py")
def test_use_adapter_switches_all_that_pefts_own_methods_switch(adapted: Any) -> None:
    expected: dict[str | None, torch.Tensor] = {}
    for adapter in ("default", "other"):
        adapted.set_adapter(adapter)
        expected[adapter] = logits(adapted)
    with adapted.disable_adapter():
        expected[None] = logits(adapted)
    adapted.set_adapter("default")
    trained = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}

    for adapter in (None, "other", "default"):
        with peft_internals.use_adapter(adapted, adapter):
            assert torch.equal(logits(adapted), expected[adapter])
    assert torch.equal(logits(adapted), expected["default"])
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == trained
    assert not torch.equal(expected["default"], expected["other"])
    assert not torch.equal(expected["default"], expected[None])


@used_by("is_adapted in alignkit/models/peft_internals.py")
def test_adapted_modules_are_layers_modules_saved_whole_and_trained_tokens(adapted: Any) -> None:
    kinds = {type(module).__name__ for module in adapted.modules() if peft_internals.is_adapted(module)}

    assert {"Linear", "ModulesToSaveWrapper", "TrainableTokensWrapper"} <= kinds
    assert not any(type(module) is nn.Linear for module in adapted.modules() if peft_internals.is_adapted(module))


@used_by("belongs_to in alignkit/models/peft_internals.py")
def test_a_parameter_carries_the_name_of_its_adapter(adapted: Any) -> None:
    named = dict(adapted.named_parameters())
    of = {a: {n for n in named if peft_internals.belongs_to(a, n)} for a in ("default", "other")}

    assert len(of["default"]) == len(of["other"]) == 2 * 2 + 1 + 1  # A and B of two layers, the head, the tokens
    assert {n.replace(".default", ".other") for n in of["default"]} == of["other"]
    assert {n for n, p in named.items() if p.requires_grad} == of["default"]


@used_by("plain_lora in alignkit/models/peft_internals.py")
@pytest.mark.parametrize(("settings", "plain"), [({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)])
def test_a_plain_lora_layer_adds_the_scaled_product(
    tiny_model: Callable[..., Path], settings: dict[str, Any], plain: bool
) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings)
    layer = peft.get_peft_model(load(tiny_model), config).eval().base_model.model.model.layers[0].self_attn.q_proj
    name = peft_internals.plain_lora(layer)

    assert name == ("default" if plain else None)
    if plain:
        x = torch.randn(3, 64)
        added = nn.functional.linear(nn.functional.linear(x, layer.lora_A[name].weight), layer.lora_B[name].weight)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + layer.scaling[name] * added)


@used_by("checkpoint_contexts in alignkit/models/peft_internals.py")
@pytest.mark.parametrize("adapter", ["default", "other", None])
def test_recomputation_uses_the_adapter_of_the_first_forward(adapted: Any, adapter: str | None) -> None:
    with peft_internals.use_adapter(adapted, adapter):
        expected = logits(adapted)
        _, recompute = peft_internals.checkpoint_contexts(adapted)
    with peft_internals.use_adapter(adapted, "other" if adapter == "default" else "default"), recompute:
        assert torch.equal(logits(adapted), expected)


@used_by("checkpoint_contexts in alignkit/models/peft_internals.py")
def test_recomputation_uses_the_adapter_that_peft_made_active(adapted: Any) -> None:
    expected = logits(adapted)
    _, recompute = peft_internals.checkpoint_contexts(adapted)
    with peft_internals.use_adapter(adapted, "other"), recompute:
        assert torch.equal(logits(adapted), expected)


# --- Transformers, accelerate, torch, datasets -----------------------------------------------------------------------


@used_by("attention_of in alignkit/models/transformers_internals.py")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_config_names_the_attention_of_its_model(tiny_model: Callable[..., Path], attention: str) -> None:
    config = load(tiny_model, attn_implementation=attention).config

    assert transformers_internals.attention_of(config) == attention


@used_by("GradientCheckpointingLayer in alignkit/models/transformers_internals.py")
def test_decoder_layers_have_a_class_in_common(tiny_model: Callable[..., Path]) -> None:
    for architecture in ("llama", "gpt2", "mixtral"):
        layers = decoder_layers(load(tiny_model, architecture))
        assert all(isinstance(layer, transformers_internals.GradientCheckpointingLayer) for layer in layers)


@used_by("has_forward_hooks in alignkit/models/torch_internals.py")
def test_a_module_tells_whether_it_has_hooks() -> None:
    module = nn.Linear(2, 2)

    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        assert not torch_internals.has_forward_hooks(module)
        handle = register(lambda *_: None)
        assert torch_internals.has_forward_hooks(module)
        handle.remove()


@used_by("CHECKPOINT_READERS in alignkit/models/transformers_internals.py")
def test_the_trainer_reads_a_checkpoint_with_these_methods() -> None:
    assert all(callable(getattr(transformers.Trainer, name)) for name in transformers_internals.CHECKPOINT_READERS)


@used_by("forward_without_autocast in alignkit/models/transformers_internals.py")
def test_accelerate_keeps_the_forward_that_it_wraps(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model)
    plain = logits(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test's trainer
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)

    assert not torch.equal(logits(prepared), plain)
    with torch.no_grad():
        output = transformers_internals.forward_without_autocast(prepared)(input_ids=IDS)
    assert torch.equal(output.logits, plain)


@used_by("has_static_shapes in alignkit/models/transformers_internals.py")
def test_models_tell_whether_they_support_static_shapes() -> None:
    of_class = transformers_internals.has_static_shapes

    assert of_class(transformers.LlamaForCausalLM)
    assert not of_class(transformers.GPTNeoForCausalLM)


@used_by("load_balancing_loss in alignkit/models/transformers_internals.py")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_load_balancing_is_that_of_the_models_own_forward(tiny_model: Callable[..., Path], architecture: str) -> None:
    model = load(tiny_model, architecture)
    inputs = {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True).aux_loss
    fused_head.install_fused_head(model)
    with torch.no_grad():
        output = fused_head.fused_logps(model, {**inputs, "labels": inputs["input_ids"], "output_router_logits": True})

    assert fused_head.uses_fused_head(model)
    torch.testing.assert_close(output.aux_loss, expected)


@used_by("check_report_to in alignkit/models/transformers_internals.py")
def test_an_unknown_integration_is_refused() -> None:
    args = transformers.TrainingArguments(use_cpu=True, report_to=["nonesuch"])

    with pytest.raises(ValueError, match="nonesuch"):
        transformers_internals.check_report_to(args)
    args.report_to = []
    transformers_internals.check_report_to(args)


@used_by("train_on_one_gpu in alignkit/models/transformers_internals.py")
def test_the_number_of_gpus_can_be_set() -> None:
    args = transformers.TrainingArguments(use_cpu=True, report_to=[])
    args._n_gpu = 4

    assert args.n_gpu == 4
    transformers_internals.train_on_one_gpu(args)
    assert args.n_gpu == 1


@used_by("set_learning_rates in alignkit/models/transformers_internals.py")
def test_learning_rates_that_are_set_are_those_that_are_logged() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    transformers_internals.set_learning_rates(schedule, optimizer, [0.25])

    assert schedule.get_last_lr() == [0.25]
    assert optimizer.param_groups[0]["lr"] == 0.25


@used_by("loading_in_turn in alignkit/models/transformers_internals.py")
def test_weights_are_loaded_without_threads_that_read_ahead(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[Any]()
    start = core_model_loading.ThreadPoolExecutor
    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", lambda *a, **k: threads.append(a) or start(*a, **k))
    before = dict(os.environ)
    with transformers_internals.loading_in_turn():
        load(tiny_model)

    assert threads == []
    assert dict(os.environ) == before
    load(tiny_model)
    assert threads


@used_by("cpu_multiplies_bf16 in alignkit/models/transformers_internals.py")
def test_torch_tells_whether_the_cpu_has_bf16() -> None:
    assert transformers_internals.cpu_multiplies_bf16() in (True, False)


@used_by("ExportableState in alignkit/training/loss_state.py")
def test_the_trainer_keeps_the_state_of_an_exportable_callback() -> None:
    class Kept(transformers.TrainerCallback, transformers_internals.ExportableState):  # type: ignore[misc]
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"number": 3}}

    kept = transformers.TrainerState(stateful_callbacks=[Kept()]).stateful_callbacks

    assert kept["Kept"] == {"args": {}, "attributes": {"number": 3}}


@used_by("load in plugins/alignkit_rewards/classify.py")
def test_transformers_finds_the_config_of_an_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    peft.LoraConfig().save_pretrained(str(tmp_path))

    assert transformers.utils.find_adapter_config_file(str(tmp_path)) is not None
    assert transformers.utils.find_adapter_config_file(str(tiny_model())) is None


@used_by("_hub in alignkit/data/sources.py")
def test_a_data_set_has_a_fingerprint_of_its_content(tmp_path: Path) -> None:
    def fingerprint(text: str) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / text))
        return str(rows._fingerprint)

    assert fingerprint("one") != fingerprint("another")


@used_by("stored_dataset in alignkit/data/token_cache.py")
def test_an_arrow_writer_writes_rows_one_by_one(tmp_path: Path) -> None:
    features = datasets.Features({"ids": datasets.List(datasets.Value("int32"))})
    with ArrowWriter(features=features, path=str(tmp_path / "rows.arrow")) as writer:
        writer.write({"ids": [1, 2]})
        writer.write({"ids": []})
        writer.finalize()

    assert datasets.Dataset.from_file(str(tmp_path / "rows.arrow")).to_list() == [{"ids": [1, 2]}, {"ids": []}]
