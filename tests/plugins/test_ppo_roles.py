"""The roles of PPO on one trunk, rollout engines, and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import GOLD, iterations, ppo, roles_of, trained
from safetensors.torch import load_file

from alignkit import Sampling
from alignkit.models import Roles, Sequences


@pytest.mark.parametrize(
    ("policy", "reward", "planned", "held"),
    [
        (
            "lora",
            "lora",
            "policy, reference, value, reward on one base",
            "policy, reference, reward, value on one base",
        ),
        ("full", "lora", "policy, reference, value, reward: a model each", "policy on a model"),
        ("lora", "full", "policy, reference, value on one base, reward by itself", "reference, value on one base"),
        ("qlora", "lora", "policy, reference, value on one base, reward by itself", "reference, value on one base"),
    ],
)
def test_roles_that_cannot_share_are_loaded_by_themselves(
    below: Callable[[str], list[str]],
    policy: str,
    reward: str,
    planned: str,
    held: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    below(policy), below(reward)
    named = ["--plugin", policy, f"ppo.policy=below-{policy}/sft", f"reward.path=below-{reward}/rm"]
    capsys.readouterr()

    assert iterations(ppo(*named, "ppo.iterations=1"))[0]["kl"] == 0
    said = capsys.readouterr().out
    assert planned in said  # in the plan, before anything is loaded
    assert held in said  # of the models that were made


def test_gradient_checkpointing_recomputes_with_the_right_adapter(
    below: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = below("lora")
    plain = ppo(*named, "ppo.iterations=1", "--output", "plain")
    asked = 0
    enable = Roles.activation_checkpointing_enable

    def counted(roles: Roles, **how: Any) -> None:
        nonlocal asked
        enable(roles, **how)
        asked += any(getattr(module, "gradient_checkpointing", False) for module in roles.modules())

    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        monkeypatch.setattr(Roles, name, counted)
    saved = ppo(*named, "ppo.iterations=1", "train.gradient_checkpointing=true", "--output", "saved")

    assert asked == 1
    for name, tensor in trained(plain).items():
        torch.testing.assert_close(trained(saved)[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_value_head_is_as_wide_as_the_states_that_a_trunk_gives(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], folder: Path
) -> None:
    """OPT-350m's trunk projects them to another width than its layers have, and so does the tiny one."""
    given = [*GOLD, "ppo.iterations=1", "ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=4"]
    run_stage("ppo", *given, "--model", str(tiny_model("opt")), "ppo.value=head", "train.max_steps=1")


@pytest.mark.parametrize(("tuner", "value"), [("lora", "adapter"), ("lora", "head"), ("full", "adapter")])
def test_a_fresh_value_starts_at_the_mean_score(folder: Path, tuner: str, value: str) -> None:
    """A value that guesses makes noise of the first advantages: its explained variance is then far below 0."""
    run = ppo(*GOLD, "ppo.iterations=1", f"ppo.value={value}", "--plugin", tuner, "train.learning_rate=1e-9")
    saved = load_file(next(run.glob("checkpoints/*/trained.safetensors")))
    (bias,) = (tensor for name, tensor in saved.items() if name.endswith(("value.bias", "score.bias")))
    first = iterations(run)[0]

    assert first["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert float(bias) == pytest.approx(first["score"] - (1 - first["eos_rate"]), abs=1e-5)  # missing_eos_penalty is 1


@pytest.mark.parametrize("adapters", [False, True])
def test_a_models_own_generation_config_does_not_bend_what_is_sampled(
    tiny_model: Callable[..., Path], adapters: bool
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from alignkit.data.chat_template import load_tokenizer
    from alignkit.generation.sampling import sample

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_model("llama")), None)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")) if adapters else model
    how = Sampling(12, temperature=0.0, stop_ids=(0,))
    plain = sample(model, tokenizer, [[5, 6, 7], [8]], how)
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 50.0, 12

    assert sample(model, tokenizer, [[5, 6, 7], [8]], how) == plain
    assert model.generation_config.repetition_penalty == 50.0


@pytest.mark.parametrize(("engine", "batch"), [("generate", None), ("generate", 2), ("continuous", None)])
def test_engines_draw_what_the_training_forward_finds_likeliest(
    tiny_model: Callable[..., Path], engine: str, batch: int | None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit.data.chat_template import load_tokenizer
    from alignkit.registry import Registry

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_model()), None)
    assert AutoTokenizer is not None
    rollout = Registry().get("rollout", engine)
    sampling = Sampling(max_new_tokens=6, temperature=0.0, stop_ids=(0,))
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    settings = rollout.config(batch) if batch else rollout.config()
    answers = rollout.build(settings, tokenizer, sampling)(model, prompts)

    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("tuner", ["lora", "qlora"])
def test_roles_are_adapters_of_one_base_and_train_apart(below: Callable[[str], list[str]], tuner: str) -> None:
    _, roles = roles_of(below(tuner))
    sequences = Sequences.of([[5, 6, 7]], [[8, 9, 0]], pad=0, device="cpu")
    assert len(roles.models) == 1
    assert {m.adapter for m in roles.members.values()} == {"default", "role_reference", "role_reward", "role_value"}
    before = {name: p.detach().clone() for name, p in roles.named_parameters()}
    trained = {name for name, p in roles.named_parameters() if p.requires_grad}
    assert all(".default." in name or ".role_value." in name or name == "heads.value.weight" for name in trained)

    roles(sequences, ("policy",))["policy"].logps.sum().backward()
    with_gradient = {n for n, p in roles.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient
    assert all(".default." in name for name in with_gradient)
    roles.zero_grad()
    roles(sequences, ("policy", "value"))["value"].sum().backward()
    with_gradient = {n for n, p in roles.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(".role_value." in name or name == "heads.value.weight" for name in with_gradient)

    torch.optim.SGD([p for p in roles.parameters() if p.requires_grad], lr=1.0).step()
    changed = {n for n, p in roles.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= with_gradient


@pytest.mark.parametrize(
    ("kind", "logits"), [("gemma", {}), ("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25})]
)
def test_log_probabilities_are_those_of_the_model_at_the_temperature(
    tiny_model: Callable[..., Path], kind: str, logits: dict[str, float]
) -> None:
    from transformers import AutoModelForCausalLM

    from alignkit.models import Member

    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32, **logits).eval()
    assert all(getattr(model.config, name) == value for name, value in logits.items())
    prompts, answers = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    sequences = Sequences.of(prompts, answers, pad=0, device="cpu")
    found = Roles({"policy": Member(model)}, temperature=0.7)(sequences, ("policy",))["policy"]

    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = model(torch.tensor([prompt + answer])).logits[0] / 0.7
        logps = logits.log_softmax(-1)
        expected = [logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
        assert found.logps[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
        entropy = -(logps.exp() * logps).sum(-1)[len(prompt) - 1 : -1]
        assert found.entropy[row, : len(answer)].tolist() == pytest.approx(entropy.tolist(), abs=1e-3)
    assert math.isclose(float(found.logps[0, 2].detach()), 0)
