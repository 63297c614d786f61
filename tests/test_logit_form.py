"""Log-probabilities are the model's own, whatever it does between its trunk and its logits."""

from __future__ import annotations

from typing import Any

import architectures
import peft
import pytest
import torch

from alignkit import AlignkitError
from alignkit.models import Member, Roles, Sequences, fused_head, logit_form
from alignkit.models.logit_form import LogitForm

PROMPT, ANSWER = [1, 2, 3, 4], [5, 9, 7, 8, 6, 3]
IDS = torch.tensor([PROMPT + ANSWER])

CANNOT_BE_BUILT = {
    "large": "blt cpmant dots3_note_text gemma4_text got_ocr2 longcat_flash phi4_multimodal roc_bert xlm",
    "a package is missing": "gemma3n",
    "other settings": "cohere_compass_text dbrx deepseek_v2 dots1 dots3_note ernie4_5_moe gemma3n_text gemma4 "
    "gemma4_assistant gemma4_unified gemma4_unified_assistant kimi_linear lfm2_moe musicgen musicgen_melody qwen4_exp "
    "qwen4_exp_text reformer xmod zamba zamba2 zaya",
}
LEFT_OUT = {name for names in CANNOT_BE_BUILT.values() for name in names.split()}
BUILT = sorted(set(architectures.NAMES) - LEFT_OUT)


def test_nearly_every_causal_architecture_is_checked() -> None:
    assert len(LEFT_OUT) <= 32
    assert len(BUILT) >= 150


def own_logps(model: Any, temperature: float = 1.0) -> torch.Tensor:
    """Of the answer's tokens, by the model's own forward."""
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ANSWER)[:, None])[:, 0]


def role_logps(model: Any, temperature: float = 1.0) -> torch.Tensor:
    """Of the answer's tokens, as PPO and ``compare`` compute them."""
    roles = Roles({"policy": Member(model, "default" if hasattr(model, "peft_config") else None)}, temperature)
    with torch.no_grad():
        logps: torch.Tensor = roles(Sequences.of([PROMPT], [ANSWER], 0, "cpu"), ("policy",))["policy"].logps[0]
    return logps


def fused_logps(model: Any) -> torch.Tensor:
    """Of the answer's tokens, as SFT and DPO compute them."""
    fused_head.install_fused_head(model)
    labels = IDS.clone()
    labels[:, : len(PROMPT)] = -100
    with torch.no_grad():
        logps: torch.Tensor = fused_head.fused_logps(model, {"input_ids": IDS, "labels": labels}).log_probs
    return logps[0, len(PROMPT) - 1 :]


@pytest.mark.parametrize("name", BUILT)
def test_log_probabilities_are_the_models_own(name: str) -> None:
    model = architectures.build(name, logits=0.7)
    expected = own_logps(model)
    torch.testing.assert_close(role_logps(model), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(role_logps(model, 0.5), own_logps(model, 0.5), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fused_logps(model), expected, rtol=1e-4, atol=1e-3)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(AlignkitError, match="BertLMHeadModel is not causal"):
        role_logps(architectures.build("bert", is_decoder=False))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", LogitForm()),
        ("cohere2_moe", LogitForm(scale=0.3)),
        ("granite_swa", LogitForm(scale=1 / 0.3)),
        ("gemma2", LogitForm(cap=0.3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_cap_are_the_configs_own_numbers(name: str, form: LogitForm, dtype: torch.dtype) -> None:
    assert logit_form.measure(architectures.build(name, logits=0.3).to(dtype)) == form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["scale", "bias", "power"])
def test_a_change_of_the_logits_that_no_config_names(change: str, dtype: torch.dtype) -> None:
    model = architectures.build("llama", logits=0.7).to(dtype)
    bias = torch.linspace(-1, 1, model.config.vocab_size, dtype=dtype)
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        logits = output.logits
        changed = {"scale": 0.9 * logits, "bias": logits + bias, "power": logits.sign() * logits.abs() ** 1.1}
        output.logits = changed[change]
        return output

    model.forward = forward
    rounding = {"rtol": 1e-4, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    said: list[str] = []
    roles = Roles({"policy": Member(model)}, say=said.append)
    for _ in range(2):
        logps = roles(Sequences.of([PROMPT], [ANSWER], 0, "cpu"), ("policy",))["policy"].logps[0]
        torch.testing.assert_close(logps, own_logps(model), **rounding)
    assert len(said) == (change != "scale")  # a scale is measured; else the model's own logits are used
    torch.testing.assert_close(fused_logps(model), own_logps(model), **rounding)
    assert fused_head.uses_fused_head(model) == (change == "scale")


def test_log_probabilities_from_own_logits_have_gradients() -> None:
    ours, plain = (architectures.build("llama4_text", logits=0.7) for _ in range(2))
    roles = Roles({"policy": Member(ours)}, temperature=0.5)
    found = roles(Sequences.of([PROMPT], [ANSWER], 0, "cpu"), ("policy",))["policy"]
    found.logps.sum().backward()
    logps = (plain(input_ids=IDS).logits[0, len(PROMPT) - 1 : -1] / 0.5).log_softmax(-1)
    logps.gather(-1, torch.tensor(ANSWER)[:, None]).sum().backward()
    torch.testing.assert_close(found.entropy[0], -(logps.exp() * logps).sum(-1))
    for mine, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_measuring_leaves_random_numbers_modes_and_hooks_as_they_were() -> None:
    model = architectures.build("gemma2").train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    logit_form.measure(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},  # of the embeddings that the head is tied to
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_the_head_counts(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    tied = "trainable_token_indices" in settings
    adapted = peft.get_peft_model(architectures.build("llama", logits=0.7, tie_word_embeddings=tied), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))

    torch.testing.assert_close(role_logps(adapted), own_logps(adapted), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fused_logps(adapted), own_logps(adapted), rtol=1e-4, atol=1e-3)
    assert not fused_head.uses_fused_head(adapted)
