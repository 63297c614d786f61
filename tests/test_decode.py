"""The decode engine: what ``generate`` gives, on every kind of position and cache; its draw; rows that leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alignkit import Sampling
from alignkit.generation import decode as decoding
from alignkit.generation.decode import adapters_in, decode, draw, same_as_generate
from alignkit.generation.sampling import sample

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22], [30]]
TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": GPT2,  # learnt positions
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gptj": {**GPT2, "rotary_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 5.0},  # soft caps, and every other layer slides
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granite": {"logits_scaling": 0.5},
    "cohere": {"logit_scale": 0.3},
    "mixtral": {"num_local_experts": 4},
}


def tiny(architecture: str, **more: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 576, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    sizes |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**sizes, **more)).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_generate(architecture: str) -> None:
    """With windows shorter than a prompt, left padding, a prompt of one token, and rows that end at several steps."""
    model = tiny(architecture, **ARCHITECTURES[architecture])
    longest = decode(model, PROMPTS, Sampling(12, temperature=0.0, stop_ids=(0,)))
    stops = (longest[0][3], longest[1][6])
    how = Sampling(12, temperature=0.0, stop_ids=stops)

    assert decode(model, PROMPTS, how) == sample(model, TOKENIZER, PROMPTS, how)
    assert same_as_generate(model, PROMPTS[0], exact=True)


def test_a_model_with_a_state_of_its_own_is_seen() -> None:
    model = tiny("mamba", state_size=8)

    assert not same_as_generate(model, PROMPTS[0], exact=True)


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2", **GPT2)
    monkeypatch.setattr(
        decoding.Decoder, "_inputs", lambda self, ids, mask: {"input_ids": ids, "past_key_values": self.cache}
    )

    assert not same_as_generate(model, PROMPTS[0], exact=True)


def test_a_prompt_is_computed_once_for_its_answers() -> None:
    model = tiny("llama")
    widths: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    torch.manual_seed(3)
    how = Sampling(4, temperature=1.0, stop_ids=(), samples=3)
    answers = decode(model, PROMPTS, how)

    assert widths == [(3, 11), (9, 1), (9, 1), (9, 1), (9, 1)]
    assert [len(answer) for answer in answers] == [4] * 9
    assert len({tuple(answer) for answer in answers}) == 9
    torch.manual_seed(3)
    assert decode(model, PROMPTS, how) == answers


def test_ended_rows_leave_and_change_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    longest = decode(model, PROMPTS, Sampling(12, temperature=0.0, stop_ids=()))
    how = Sampling(12, temperature=0.0, stop_ids=(longest[2][1],))
    rows: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = decode(model, PROMPTS, how)
    monkeypatch.setattr(decoding, "LEAVE", 2.0)  # nobody leaves

    assert rows[-1] < 3
    assert decode(model, PROMPTS, how) == answers


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_are_drawn_from_the_distribution(top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -torch.inf, 0.0])
    how = Sampling(1, temperature=1.5, stop_ids=(), top_p=top_p)
    p = (logits / 1.5).softmax(0)
    if top_p < 1:  # the two likeliest are the fewest that have it
        p = torch.where(p >= p.topk(2).values[-1], p, 0)
        p = p / p.sum()
    torch.manual_seed(0)
    drawn = torch.cat([draw(logits.expand(10_000, -1), how) for _ in range(10)])
    share = torch.bincount(drawn, minlength=6) / len(drawn)

    assert share[p == 0].sum() == 0
    torch.testing.assert_close(share, p, atol=4 * 0.5 / len(drawn) ** 0.5, rtol=0)


def test_the_last_number_below_one_draws_a_token_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0, -torch.inf, -torch.inf]])
    how = Sampling(1, temperature=1.0, stop_ids=())
    for number, token in ((0.0, 0), (1 - 2**-53, 2), (1.0, 2)):
        monkeypatch.setattr(torch, "rand", lambda *args, number=number, **kw: torch.full(args[0], number, **kw))
        assert int(draw(logits, how)) == token


def test_adapters_are_put_back_to_the_bit() -> None:
    model = peft.get_peft_model(tiny("llama").to(torch.bfloat16), peft.LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32)
    before = {name: p.data.clone() for name, p in model.named_parameters()}
    with adapters_in(torch.bfloat16, model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        decode(model, PROMPTS, Sampling(2, temperature=0.0, stop_ids=()))

    assert all(torch.equal(p, before[name]) and p.dtype is before[name].dtype for name, p in model.named_parameters())


def test_it_is_an_engine_that_falls_back_with_a_line(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.py").write_text("def length(prompts, answers):\n    return [len(a) / 10 for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["ppo.policy=base", "reward.name=function", "reward.call=scores:length", "ppo.iterations=1"]
    small += ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=4", "ppo.rollout.name=decode"]
    run_stage("ppo", *small, "train.max_steps=1")
    assert "generate" not in capsys.readouterr().out.partition("\nppo\n")[2]

    monkeypatch.setattr("alignkit.generation.decode.same_as_generate", lambda *_, **__: False)
    run_stage("ppo", *small, "train.max_steps=1", "--overwrite")
    assert "cannot decode this model" in capsys.readouterr().out
