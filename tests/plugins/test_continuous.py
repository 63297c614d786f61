"""The continuous engine computes what the run computes, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit import AlignkitError, Sampling
from alignkit.data.chat_template import load_tokenizer
from alignkit.generation.sampling import sample
from alignkit_rollouts.paged import continuous

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0, stop_ids=(0,))


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    with torch.no_grad():  # answers that rounding does not change
        model.lm_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def tokenizer(tiny_model: Callable[..., Path]) -> Any:
    return load_tokenizer(str(tiny_model()), None)


@pytest.mark.parametrize("bf16", [False, True])
def test_it_computes_in_the_runs_number_format(model: Any, tokenizer: Any, bf16: bool) -> None:
    seen: set[torch.dtype] = set()
    model = peft.get_peft_model(model.bfloat16(), peft.LoraConfig(init_lora_weights=False)) if bf16 else model
    inner = model.get_base_model() if bf16 else model
    inner.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    forward, attention = inner.forward, inner.config._attn_implementation
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        answers = continuous(tokenizer, GREEDY)(model, PROMPTS)
        expected = sample(model, tokenizer, PROMPTS, GREEDY)

    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert answers == expected
    assert inner.forward == forward
    assert inner.config._attn_implementation == attention


def test_it_refuses_fp32_weights_under_autocast(model: Any, tokenizer: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AlignkitError, match="bfloat16 with weights in float32"):
        continuous(tokenizer, GREEDY)(model, PROMPTS)


def test_autocast_reaches_the_thread_that_generates(model: Any, tokenizer: Any) -> None:
    seen: list[bool] = []
    model = model.bfloat16()
    model.model.register_forward_pre_hook(lambda module, inputs: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        continuous(tokenizer, GREEDY)(model, PROMPTS)

    assert all(seen)


def test_it_does_not_switch_to_flash_attention(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: True)
    switched: list[str] = []
    monkeypatch.setattr(model, "set_attn_implementation", switched.append)
    continuous(tokenizer, GREEDY)(model, PROMPTS)

    assert switched == []


def test_it_refuses_a_model_that_it_answers_wrongly_for(model: Any, tokenizer: Any) -> None:
    plain = model.model.layers[0].mlp.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        ragged = hidden.shape[1] == sum(map(len, PROMPTS[:2]))  # the engine puts prompts one after another
        return plain(hidden) + (100.0 * hidden.flip(-1) if ragged else 0.0)

    model.model.layers[0].mlp.forward = forward
    with pytest.raises(AlignkitError, match="rollout 'continuous' samples wrong answers from LlamaForCausalLM"):
        continuous(tokenizer, GREEDY)(model, PROMPTS)
