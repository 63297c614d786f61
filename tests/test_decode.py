"""The decode loop: it samples what ``generate`` samples, on every architecture that it supports."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import peft
import pytest
import torch
from test_logit_form import BUILT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alignkit import Sampling
from alignkit.errors import AlignkitError
from alignkit.generation import decode as decoding
from alignkit.generation import generate, sample, sampling
from alignkit.generation.decode import decode, draw
from alignkit.generation.sampling import difference

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22], [30], [20, 21, 22]]
TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
VARIED: dict[str, dict[str, Any]] = {  # kinds of attention, positions and logits, with windows shorter than a prompt
    "llama": {},
    "gpt2": GPT2,  # learned positions
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
UNSUPPORTED = (
    "bamba bart bigbird_pegasus blenderbot blenderbot-small deepseek_v4 falcon_mamba git granitemoehybrid jamba "
    "llama4 llama4_text mamba mamba2 marian mbart minimax mllama mvp openai-gpt pegasus plbart prophetnet "
    "recurrent_gemma rwkv whisper xlnet xlstm"
)


def tiny(architecture: str, **more: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 576, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    sizes |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**sizes, **more)).eval()


def check_greedy(model: Any) -> None:
    """With left padding, a prompt of one token, a prompt that is there twice, and rows that end at several steps."""
    longest = decode(model, PROMPTS, Sampling(12, temperature=0.0, stop_ids=()))
    greedy = Sampling(12, temperature=0.0, stop_ids=(longest[0][3], longest[1][6]))

    assert decode(model, PROMPTS, greedy) == generate(model, TOKENIZER, PROMPTS, greedy)


@pytest.mark.parametrize("architecture", VARIED)
def test_greedy_answers_are_those_of_generate(architecture: str) -> None:
    model = tiny(architecture, **VARIED[architecture])

    assert difference(model, PROMPTS[0]) is None
    check_greedy(model)


@pytest.mark.parametrize("architecture", BUILT)
def test_an_architecture_is_decoded_as_generate_does_or_is_not_supported(architecture: str) -> None:
    model = architectures.build(architecture)

    supported = architecture not in UNSUPPORTED.split()

    assert (difference(model, PROMPTS[0]) is None) == supported
    if supported:
        check_greedy(model)
    if supported and difference(model, PROMPTS[0], graphs=True) is None:
        check_graph_steps(model)


def check_graph_steps(model: Any) -> None:
    """Steps over fixed memory, as a CUDA graph needs them, give the answers of the plain loop."""
    longest = decode(model, PROMPTS, Sampling(12, temperature=0.0, stop_ids=()))
    greedy = Sampling(12, temperature=0.0, stop_ids=(longest[0][3], longest[1][6]))

    assert decode(model, PROMPTS, greedy, graphs=True) == decode(model, PROMPTS, greedy)


@pytest.mark.parametrize("wrong", ["no mask", "rows stay"])
def test_a_decoder_that_differs_from_generate_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2", **GPT2)
    inputs = decoding.Decoder._inputs
    if wrong == "no mask":
        without = lambda *args: {k: v for k, v in inputs(*args).items() if k in ("input_ids", "past_key_values")}  # noqa: E731
        monkeypatch.setattr(decoding.Decoder, "_inputs", without)
    else:
        monkeypatch.setattr("alignkit.generation.cache.FixedLayer.reorder_cache", lambda self, rows: None)

    assert difference(model, PROMPTS[0]) is not None


def test_a_prompt_is_computed_once_for_all_of_its_answers() -> None:
    model = tiny("llama")
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    torch.manual_seed(3)
    answers = decode(model, PROMPTS, Sampling(4, temperature=1.0, stop_ids=(), samples=3))

    assert shapes == [(3, 11), (12, 1), (12, 1), (12, 1), (12, 1)]
    assert [len(answer) for answer in answers] == [4] * 12
    assert len({tuple(answer) for answer in answers}) == 12


def test_log_probabilities_are_those_of_the_answers_tokens() -> None:
    model = tiny("gemma2", **VARIED["gemma2"])
    torch.manual_seed(0)
    sampling = Sampling(6, temperature=0.7, stop_ids=(3, 5, 8, 13), samples=2, top_p=0.9)
    answers = decode(model, PROMPTS, sampling)
    greedy = decode(model, PROMPTS, Sampling(3, temperature=0.0, stop_ids=()))

    assert answers.logps is not None
    assert greedy.logps is not None
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    for temperature, *rows in ((0.7, prompts, answers, answers.logps), (1.0, PROMPTS, greedy, greedy.logps)):
        for prompt, answer, logps in zip(*rows, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(logps), expected)


def test_answers_do_not_depend_on_when_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    rows: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampling = Sampling(12, temperature=1.0, stop_ids=tuple(range(0, 576, 9)), samples=4)
    torch.manual_seed(0)
    answers = decode(model, PROMPTS, sampling)
    assert rows[1] == 16
    assert rows[-1] < 8
    monkeypatch.setattr(decoding, "LEAVE", 2.0)  # finished answers stay
    rows.clear()
    torch.manual_seed(0)

    assert decode(model, PROMPTS, sampling) == answers
    assert set(rows[1:]) == {16}


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [6, 1000])  # one block, or several of which the last is not full
def test_tokens_are_drawn_from_the_distribution(top_p: float, vocabulary: int) -> None:
    logits = torch.full((vocabulary,), -torch.inf)
    logits[[0, 1, 2, -3, -1]] = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    p = (logits / 1.5).softmax(0)
    if top_p < 1:  # the two likeliest are the fewest that have it
        p = torch.where(p >= p.topk(2).values[-1], p, 0)
        p = p / p.sum()
    torch.manual_seed(0)
    uniform, sampling = torch.rand(20_000, dtype=torch.double), Sampling(1, 1.5, stop_ids=(), top_p=top_p)
    drawn = torch.cat([draw(logits.expand(len(part), -1), part, sampling)[0] for part in uniform.split(2_000)])
    counts = torch.bincount(drawn, minlength=vocabulary)
    chi_square = ((counts - p * len(drawn)).square() / (p * len(drawn)))[p > 0].sum()

    assert counts[p == 0].sum() == 0
    assert chi_square < 20  # 4 degrees of freedom: 20 has a probability of 0.0005


def test_sampled_sequences_have_the_models_distribution() -> None:
    """Of two tokens after a padded prompt, in a vocabulary of 9."""
    model = architectures.build("llama", vocab_size=9)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        second = torch.stack([model(torch.tensor([[4, token]])).logits[0, -1].softmax(-1) for token in range(9)])
        p = (model(torch.tensor([[4]])).logits[0, -1].softmax(-1)[:, None] * second).flatten()
    torch.manual_seed(0)
    sampled = decode(model, [[4], [1, 2, 3]], Sampling(2, temperature=1.0, stop_ids=(), samples=5000))[:5000]
    counts = torch.bincount(torch.tensor([9 * first + after for first, after in sampled]), minlength=81)
    chi_square = ((counts - p * 5000).square() / (p * 5000)).sum()

    assert chi_square < 133  # 80 degrees of freedom: 133 has a probability of 0.0002


def test_random_numbers_near_zero_and_one_draw_tokens_that_are_possible() -> None:
    logits = torch.full((1, 600), -torch.inf)
    logits[0, [3, 300, 301]] = torch.tensor([1.0, 2.0, 0.0])
    for number, token in ((0.0, 3), (1 - 2**-53, 301), (1.0, 301)):
        uniform = torch.tensor([number], dtype=torch.double)
        assert int(draw(logits, uniform, Sampling(1, temperature=1.0, stop_ids=()))[0]) == token


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    model = peft.get_peft_model(
        tiny("llama").to(dtype), peft.LoraConfig(target_modules="all-linear", lora_dropout=0.1, **config)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True, "r": 4}, {"lora_bias": True}])
def test_adapters_are_decoded_as_peft_computes_them(config: dict[str, Any]) -> None:
    model = adapted(**config)
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    greedy = Sampling(8, temperature=0.0, stop_ids=())
    with model.disable_adapter():
        base = decode(model, PROMPTS, greedy)
        assert base == generate(model, TOKENIZER, PROMPTS, greedy)
    answers = decode(model, PROMPTS, greedy)
    model.set_adapter("other")

    assert answers != base
    assert answers != decode(model, PROMPTS, greedy) == generate(model, TOKENIZER, PROMPTS, greedy)
    model.set_adapter("default")
    assert answers == generate(model, TOKENIZER, PROMPTS, greedy)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_compute_in_16_bits_and_stay_as_they_are(autocast: bool) -> None:
    model = adapted(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = torch.randn(3, 2, 128, dtype=torch.bfloat16)
        expected = layer(x)
        with decoding.lora_forward(model):
            assert "forward" in vars(layer)
            fast = layer(x)
        assert difference(model, PROMPTS[0]) is None

    assert fast.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(fast, expected, rtol=0.02, atol=0.02)
    assert "forward" not in vars(layer)
    assert all(torch.equal(p, before[name]) and p.dtype is before[name].dtype for name, p in model.named_parameters())


def test_an_adapter_of_a_4_bit_base_is_decoded() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    base = tiny("llama")
    for layer, name in itertools.product(base.model.layers, ("gate_proj", "up_proj")):
        plain = getattr(layer.mlp, name)
        quantized = Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        quantized.load_state_dict(plain.state_dict())
        quantized.support_avx512bf16_for_cpu = False
        setattr(layer.mlp, name, quantized.to("cpu"))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()

    check_greedy(model)


@pytest.mark.parametrize("batch", [None, 4])
def test_engines_give_answers_in_the_order_of_their_prompts(batch: int | None) -> None:
    from alignkit.registry import Registry

    model, greedy = tiny("llama"), Sampling(4, temperature=0.0, stop_ids=(), samples=2)
    expected = [answer for prompt in PROMPTS for answer in decode(model, [prompt], greedy)]
    for name in ("decode", "generate"):
        rollout = Registry().get("rollout", name)
        surroundings = {"device": torch.device("cpu"), "config": SimpleNamespace(train={}), "say": pytest.fail}
        run = {"run": SimpleNamespace(**surroundings)} if name == "decode" else {}
        answers = rollout.build(rollout.config(batch), TOKENIZER, greedy, **run)(model, PROMPTS)

        assert answers == expected
        assert [len(row) for row in answers.logps or []] == ([4] * 8 if name == "decode" else [])


def test_a_model_that_is_not_supported_is_sampled_with_generate_and_one_line() -> None:
    model, lines = tiny("mamba", state_size=8), list[str]()
    greedy = Sampling(4, temperature=0.0, stop_ids=())
    answers = [sample(model, TOKENIZER, PROMPTS, greedy, lines.append) for _ in range(2)]

    assert answers == [generate(model, TOKENIZER, PROMPTS, greedy)] * 2
    (line,) = lines
    assert re.fullmatch(r"the decode loop does not support MambaForCausalLM \(.+\): sampling with .* generate", line)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.0, 0.9)])
@pytest.mark.parametrize("function", [decode, lambda model, *rest: generate(model, TOKENIZER, *rest)])
def test_logits_that_are_not_finite_are_an_error(
    function: Callable[..., Any], temperature: float, top_p: float, value: float
) -> None:
    """One row of several. The token would be the first, or index nothing: on CUDA, that ends the process."""
    model = tiny("gpt2", **GPT2)
    with torch.no_grad():
        model.transformer.wte.weight[PROMPTS[2][0]] = value

    with pytest.raises(AlignkitError, match=r"logits are NaN or infinite.*try bfloat16"):
        function(model, PROMPTS, Sampling(3, temperature=temperature, top_p=top_p, stop_ids=()))


def test_a_broken_model_is_not_said_to_be_unsupported_because_of_its_kind() -> None:
    model, lines = tiny("llama"), list[str]()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(AlignkitError, match="logits are NaN or infinite"):
        sample(model, TOKENIZER, PROMPTS, Sampling(3, temperature=1.0, stop_ids=()), lines.append)
    assert "(the logits of generate are NaN or infinite)" in lines[0]


def test_only_an_error_that_means_a_model_is_not_supported_leads_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory, a broken device or Ctrl-C is not a reason to sample more slowly."""
    errors: list[BaseException] = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyboardInterrupt()]
    for error in errors:
        monkeypatch.setattr(sampling.Decoder, "logits", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            sample(tiny("llama"), TOKENIZER, PROMPTS, Sampling(2, temperature=0.0, stop_ids=()), pytest.fail)

    lines: list[str] = []
    monkeypatch.setattr(sampling.Decoder, "logits", lambda self: [][0])
    sample(tiny("llama"), TOKENIZER, PROMPTS, Sampling(2, temperature=0.0, stop_ids=()), lines.append)
    assert "LlamaForCausalLM (IndexError: list index out of range): sampling with" in lines[0]


def test_ppo_decodes_by_default(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.py").write_text("def length(prompts, answers):\n    return [len(a) / 10 for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["ppo.policy=base", "reward.name=function", "reward.call=scores:length", "ppo.iterations=1"]
    small += ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=4", "train.max_steps=1"]
    merged: list[bool] = []
    plain = decode
    monkeypatch.setattr(
        sampling, "decode", lambda *args, **options: merged.append(options["merged"]) or plain(*args, **options)
    )
    run_stage("ppo", *small)
    run_stage("ppo", *small, "--overwrite", "rollout.merge_lora=true")
    assert {False, True} <= set(merged)
    assert "generate" not in capsys.readouterr().out.partition("\nppo\n")[2]

    monkeypatch.setattr(sampling, "difference", lambda *_: "why")
    run_stage("ppo", *small, "--overwrite")
    assert "the decode loop does not support LlamaForCausalLM (why)" in capsys.readouterr().out
