"""PPO: its formulas by hand, the roles on one trunk, rollouts, rewards, evaluation, exact resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import on_two_processes
from safetensors.torch import load_file

from alignkit import AlignkitError, PolicyBatch, Sampling
from alignkit.cli import main
from alignkit.models import Roles, Sequences
from alignkit.online import diagnosis, kl
from alignkit.online.statistics import Statistics
from alignkit_ppo import gae, losses

PROMPTS = [{"prompt": f"What is {n} and one?"} for n in range(12)]
ONES = torch.ones(1, 3, dtype=torch.bool)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    values, rewards = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[-0.1, 0.0, 1.0]])
    advantages, returns = gae.gae(rewards, values, ONES, gamma=1.0, lam=0.95)

    torch.testing.assert_close(advantages, torch.tensor([[0.33675, 0.565, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.83675, 0.965, 1.0]]))


def test_gae_does_not_see_padding() -> None:
    values = torch.tensor([[0.5, 0.4, 0.3, 9.0, 9.0]])
    rewards = torch.tensor([[-0.1, 0.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False]])
    advantages, returns = gae.gae(rewards, values, mask, 1.0, 0.95)

    torch.testing.assert_close(advantages, torch.tensor([[0.33675, 0.565, 0.7, 0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.83675, 0.965, 1.0, 0, 0]]))


def test_the_score_stands_at_the_last_token_of_the_answer() -> None:
    logps, reference = torch.tensor([[-1.0, -2, -3]] * 2), torch.tensor([[-1.5, -2, -2]] * 2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    penalty = kl.kl_penalty(logps, reference, mask, kl_coef=0.1)
    rewards = gae.token_rewards(torch.tensor([2.0, 5.0]), penalty, mask)

    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0, 2.1], [-0.05, 5, 0]]))


def test_whitening_is_over_tokens() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    statistics = Statistics(accelerate.Accelerator(cpu=True))

    torch.testing.assert_close(statistics.whiten(values, mask), torch.tensor([[-1.0, 1.0, 0.0]]))
    torch.testing.assert_close(statistics.whiten(values, mask, shift=False), torch.tensor([[1.0, 3.0, 0.0]]))


def test_the_adaptive_coefficient_moves_by_a_fifth_at_most() -> None:
    assert kl.next_kl_coef(0.1, kl=6.6, target=6, answers=1000, horizon=10000) == pytest.approx(0.1 * 1.01)
    assert kl.next_kl_coef(0.1, kl=99, target=6, answers=1000, horizon=10000) == pytest.approx(0.1 * 1.02)
    assert kl.next_kl_coef(0.1, kl=0, target=6, answers=1000, horizon=10000) == pytest.approx(0.1 * 0.98)


def policy_batch(ratio: list[float], advantages: list[float], values: list[float], returns: list[float]) -> PolicyBatch:
    n = len(ratio)
    return PolicyBatch(
        logps=torch.tensor([ratio]).log(),
        old_logps=torch.zeros(1, n),
        advantages=torch.tensor([advantages]),
        values=torch.tensor([values]),
        old_values=torch.zeros(1, n),
        returns=torch.tensor([returns]),
        entropy=torch.full((1, n), 2.0),
        mask=torch.ones(1, n, dtype=torch.bool),
        num_tokens=n,
    )


def test_ppo_clip_by_hand() -> None:
    batch = policy_batch([1.5, 0.5, 1.1], [1.0, -1.0, 2.0], [0.1, 0.5, -0.1], [1.0, 0.0, 0.0])
    policy = (-1.2 + 0.8 - 2.2) / 3  # the first two are clipped
    value = (0.9**2 + 0.5**2 + 0.1**2) / 2 / 3  # the second would be 0.2 clipped, and the larger counts
    found = losses.ppo_clip(losses.ClipConfig(entropy_coef=0.01))(batch)

    assert found.loss.item() == pytest.approx(policy + 0.1 * value - 0.01 * 2, abs=1e-6)
    assert found.metrics["clip_fraction"] == pytest.approx(2 / 3)
    assert found.metrics["ratio"] == pytest.approx(3.1 / 3)


def test_dual_clip_bounds_bad_tokens_that_became_likely() -> None:
    batch = policy_batch([10.0], [-1.0], [0.0], [0.0])

    assert losses.ppo_clip(losses.ClipConfig())(batch).loss.item() == pytest.approx(10)
    assert losses.ppo_dual_clip(losses.DualClipConfig())(batch).loss.item() == pytest.approx(3)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> Path:
    """A working folder with prompts, and a module of rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    Path("gold.py").write_text(
        "def letters(prompts, answers):\n    return [answer.count('e') / 4 for answer in answers]\n"
        "def broken(prompts, answers):\n    raise KeyError('oh')\n"
        "def few(prompts, answers):\n    return [0.5]\n"
        "def nan(prompts, answers):\n    return [float('nan')] * len(answers)\n"
    )
    shutil.copytree(tiny_model(), "base")
    return tmp_path


SMALL = [
    *("--model", "base", "--data", "prompts.jsonl", "--output", "runs", "data.eval_size=4", "train.use_cpu=true"),
    *("ppo.batch_size=8", "ppo.minibatches=2", "ppo.response_length=12", "ppo.eval_every=2", "ppo.save_every=1"),
    *("train.per_device_train_batch_size=2", "train.learning_rate=1e-3", "train.bf16=false"),
]
GOLD = ["ppo.policy=base", "reward.name=function", "reward.call=gold:letters"]


def ppo(*arguments: str) -> Path:
    assert main(["--debug", "train", "--plugin", "ppo", *SMALL, *arguments]) == 0
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs"
    return Path(output) / "ppo"


def logs(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def iterations(run: Path) -> list[dict[str, Any]]:
    return [line for line in logs(run) if "seconds_sampling" in line]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in run.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def below(folder: Path) -> Callable[[str], list[str]]:
    """``below("lora")``: an SFT and a reward run of that tuner, and the arguments that name them."""
    from conftest import DEMONSTRATIONS

    rows = [{"prompt": f"p{n}", "responses": ["e e e", "b", "e c"], "ranks": [0, 2, 1]} for n in range(12)]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    Path("rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(tuner: str) -> list[str]:
        common = ["--plugin", tuner, "--model", "base", "--output", f"below-{tuner}", "train.use_cpu=true"]
        common += ["train.max_steps=8", "train.learning_rate=0.003", "train.bf16=false", "data.eval_size=2"]
        assert main(["train", "--plugin", "sft", "--data", "demos.jsonl", *common]) == 0
        assert main(["train", "--plugin", "rm", "--data", "rankings.jsonl", *common]) == 0
        return ["--plugin", tuner, f"ppo.policy=below-{tuner}/sft", f"reward.path=below-{tuner}/rm"]

    return make


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_ppo_runs_on_sft_and_reward_of_every_tuner(below: Callable[[str], list[str]], tuner: str) -> None:
    run = ppo(*below(tuner), "ppo.iterations=2")
    first, second = iterations(run)
    manifest = json.loads((run / "alignkit.json").read_text())

    assert first["kl"] == 0
    assert second["kl"] != 0
    assert {"score", "kl_coef", "entropy", "clip_fraction", "approx_kl", "explained_variance", "eos_rate"} <= set(first)
    assert set(manifest["parents"]) == {"policy", "reward"}
    assert manifest["role"] == "policy"
    assert not any("value" in name or "score" in name or "reference" in name for name in trained(run))
    assert main(["chat", str(run), "--prompt", "Hi", "--max-new-tokens", "4"]) == 0


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


LEARN = [
    *(*GOLD, "--plugin", "full", "ppo.batch_size=32", "ppo.response_length=8", "train.per_device_train_batch_size=16"),
    *("train.learning_rate=3e-3", "ppo.eval_every=99", "ppo.save_every=99", "ppo.missing_eos_penalty=0"),
]


def test_a_function_is_a_reward_and_is_learnt(folder: Path) -> None:
    """The letter e is in one token twice: eight such tokens score 4, the most there is; it starts at about 0.3."""
    scores = [line["score"] for line in iterations(ppo(*LEARN, "ppo.iterations=45", "ppo.kl_coef=0"))]

    assert scores[0] < 0.6
    assert scores[-1] > 3.6


def test_the_policy_of_the_best_evaluation_is_kept(folder: Path) -> None:
    """With a rate so large that it gets worse again, the run holds a policy from the middle."""
    settings = [*LEARN, "ppo.iterations=12", "ppo.kl_coef=0", "ppo.eval_every=1", "train.learning_rate=0.3"]
    last, best = (ppo(*settings, f"ppo.keep={which}", "--output", which) for which in ("last", "best"))
    evaluated = [line["eval_score"] for line in logs(last) if "eval_score" in line]

    assert max(evaluated) > evaluated[-1]
    assert json.loads((last / "alignkit.json").read_text())["metrics"]["eval_score"] == evaluated[-1]
    assert json.loads((best / "alignkit.json").read_text())["metrics"]["eval_score"] == max(evaluated)


def test_what_commonly_goes_wrong_is_warned_of_once() -> None:
    said: list[str] = []
    first = {"entropy": 2.0, "eos_rate": 0.8, "length": 20.0, "score": 0.0}
    watch = diagnosis.FailureSigns(said.append, expect_eos=True)
    watch.check(first, first)
    assert not said
    for _ in range(2):
        watch.check({"entropy": 0.3, "eos_rate": 0.0, "length": 50.0, "score": 1.0}, first)

    assert [line.split()[1] for line in said] == ["entropy", "almost", "answers"]


def test_a_policy_that_is_not_its_reference_or_not_what_sampled_stops_the_run() -> None:
    diagnosis.check_reference(torch.zeros(1, 3), ONES, exact=True)
    with pytest.raises(AlignkitError, match="the reference is not the model"):
        diagnosis.check_reference(torch.full((1, 3), 0.01), ONES, exact=True)
    model, batch = torch.nn.Linear(1, 1), policy_batch([1.0], [0.0], [0.0], [0.0])
    assert diagnosis.check_first_step(batch, model, True, recompute=lambda: batch.logps) is None
    with pytest.raises(AlignkitError, match="dropout is on in 0"):
        diagnosis.check_first_step(
            batch, torch.nn.Sequential(torch.nn.Dropout(0.1)), True, recompute=lambda: batch.logps
        )
    other = policy_batch([1.1], [0.0], [0.0], [0.0])
    with pytest.raises(AlignkitError, match="differ from call to call"):
        diagnosis.check_first_step(other, model, True, recompute=lambda: other.logps)


def test_in_16_bits_a_difference_between_shapes_is_rounding_and_one_between_calls_is_not() -> None:
    model, batch = torch.nn.Linear(1, 1), policy_batch([1.05], [0.0], [0.0], [0.0])
    line = diagnosis.check_first_step(batch, model, False, recompute=lambda: batch.logps)
    assert line is not None
    assert "differ by 0.049 per token between batches of different shapes" in line
    with pytest.raises(AlignkitError, match="differ from call to call"):
        diagnosis.check_first_step(batch, model, False, recompute=lambda: batch.old_logps)
    far = policy_batch([1.5], [0.0], [0.0], [0.0])
    with pytest.raises(AlignkitError, match="differ from call to call"):  # far too much for rounding
        diagnosis.check_first_step(far, model, False, recompute=lambda: far.logps)


def test_a_large_kl_coefficient_keeps_the_policy_where_it_was(folder: Path) -> None:
    held = iterations(ppo(*LEARN, "ppo.iterations=25", "ppo.kl_coef=100"))

    assert max(abs(line["kl"]) for line in held) < 1
    assert held[-1]["score"] < 1


def test_optimizer_steps_are_epochs_times_minibatches_whatever_the_microbatch(folder: Path) -> None:
    settings = [*GOLD, "ppo.iterations=2", "ppo.epochs=3", "ppo.minibatches=2", "optimizer.name=adamw"]
    one = ppo(*settings, "train.per_device_train_batch_size=4", "--output", "one")
    two = ppo(*settings, "train.per_device_train_batch_size=1", "--output", "two")

    assert [json.loads((run / "alignkit.json").read_text())["steps"] for run in (one, two)] == [12, 12]
    for a, b in zip(iterations(one), iterations(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


ACTS = [
    *("train.max_grad_norm=1e-6", "train.lr_scheduler_type=linear", "train.bf16=true", "ppo.value=head", "ppo.ema=0.5"),
    *("ppo.lam=0.5", "ppo.gamma=0.9", "ppo.whiten_rewards=true", "ppo.score_clip=0.1", "ppo.temperature=0.7"),
    *("ppo.epochs=2", "ppo.kl_target=0.01", "ppo.samples_per_prompt=2", "loss.cliprange=0.001", "loss.value_coef=2"),
    *(
        "loss.entropy_coef=1",
        "--plugin=ppo-dual-clip loss.dual_clip=1.001",
        "optimizer.name=adafactor",
        "train.warmup_steps=4",
    ),
    *("rollout.batch=3", "rollout.name=continuous"),
]


def test_every_setting_acts(folder: Path) -> None:
    plain = trained(ppo(*GOLD, "ppo.iterations=2", "ppo.kl_horizon=100", "data.eval_size=0", "--output", "plain"))
    for setting in ACTS:
        other = ppo(
            *GOLD, "ppo.iterations=2", "ppo.kl_horizon=100", "data.eval_size=0", "--output", "other", *setting.split()
        )
        assert any(not torch.equal(tensor, trained(other)[name]) for name, tensor in plain.items()), setting
        shutil.rmtree("other")


def test_it_stops_at_a_kl_bound_and_tells_callbacks(folder: Path, install: Callable[..., None]) -> None:
    install(
        "count",
        """
        from pathlib import Path
        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import TrainerCallback

            class Count(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    with Path("steps").open("a") as file:
                        file.write("x")

                def on_log(self, args, state, control, logs=None, **kwargs):  # as trackers do
                    with Path("logged").open("a") as file:
                        file.write(" ".join(logs) + " ")

            return [Count()]
        """,
    )
    run = ppo(*GOLD, "--plugin", "count", "ppo.iterations=30", "ppo.max_kl=0.05", "train.learning_rate=0.01")

    assert 1 < len(iterations(run)) < 30
    assert iterations(run)[-1]["kl"] > 0.05 >= iterations(run)[-2]["kl"]
    assert len(Path("steps").read_text()) == 2 * len(iterations(run))
    assert {"score", "kl", "entropy", "value_loss", "eval_score", "eval_kl"} <= set(Path("logged").read_text().split())


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


TEXTS = [{"text": "The cat sat on the mat, and it was warm."}, {"text": "Rain falls. " * 40}, {"text": "Yes."}]


def test_pretraining_text_is_mixed_in(folder: Path) -> None:
    """The loss of all three texts at the first step is the base's own; then it falls, and both gradients are told."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    mixed = ["ppo.ptx_coef=1", "ppo.ptx_data=texts.jsonl", "ppo.ptx_batch_size=3", "ppo.ptx_length=400"]
    settings = [*GOLD, *mixed, "ppo.minibatches=1", "ppo.iterations=4", "train.learning_rate=1e-2"]
    one = iterations(ppo(*settings, "train.per_device_train_batch_size=4", "--output", "one"))
    two = iterations(ppo(*settings, "train.per_device_train_batch_size=1", "--output", "two"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
    losses, targets = 0.0, 0
    for row in TEXTS:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        losses += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1

    assert one[0]["ptx_loss"] == pytest.approx(losses / targets, abs=1e-4)
    assert one[-1]["ptx_loss"] < one[0]["ptx_loss"] - 0.05
    for a, b in zip(one, two, strict=True):
        assert a["ptx_loss"] == pytest.approx(b["ptx_loss"], abs=1e-3)
        assert a["ptx_grad_norm"] == pytest.approx(b["ptx_grad_norm"], rel=0.02)
        together = a["ptx_grad_norm"] + a["ppo_grad_norm"]
        assert abs(a["ptx_grad_norm"] - a["ppo_grad_norm"]) < a["grad_norm"] < together


def test_pretraining_text_is_that_of_the_sft_run_where_it_is_short_enough(
    below: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    named = below("lora")
    run = ppo(*named, "ppo.iterations=1", "ppo.ptx_coef=0.5", "ppo.ptx_length=40", "ppo.ptx_batch_size=2")

    assert iterations(run)[0]["ptx_loss"] > 0
    assert "of 16 demonstrations are over ppo.ptx_length=40: left out" in capsys.readouterr().out


def test_a_value_head_is_as_wide_as_the_states_that_a_trunk_gives(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], folder: Path
) -> None:
    """OPT-350m's trunk projects them to another width than its layers have, and so does the tiny one."""
    given = [*GOLD, "ppo.iterations=1", "ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=4"]
    run_stage("ppo", *given, "--model", str(tiny_model("opt")), "ppo.value=head", "train.max_steps=1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["ppo.ptx_data=prompts.jsonl"], "ppo.ptx_data has no effect without ppo.ptx_coef"),
        (["ppo.ptx_coef=1"], "ppo.ptx_coef: there is no text to train on: set ppo.ptx_data"),
        (["ppo.minibatches=3"], "ppo.batch_size=8 cannot be split into ppo.minibatches=3"),
        (["train.per_device_train_batch_size=3"], "microbatches (train.per_device_train_batch_size=3, 1 processes)"),
        (["ppo.samples_per_prompt=3"], "ppo.batch_size must be a multiple of ppo.samples_per_prompt"),
        (["rollout.name=runs-on"], "goes on after the token that ends it"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    folder: Path, settings: list[str], said: str, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    install(
        "runs-on",
        """
        from alignkit import Rollout, hookimpl

        @hookimpl
        def alignkit_rollout():
            return [Rollout(name="runs-on", summary="", build=lambda config, tokenizer, sampling: (
                lambda policy, prompts: [[sampling.stop_ids[0], 5] for _ in prompts]))]
        """,
    )
    assert main(["train", "--plugin", "ppo", "--plugin", "runs-on", *SMALL, *GOLD, *settings]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_the_value_warms_up_alone(folder: Path, value: str) -> None:
    run = ppo(*GOLD, "ppo.iterations=2", "ppo.value_warmup=2", f"ppo.value={value}")

    assert [line["kl"] for line in iterations(run)] == [0, 0]
    assert all(float(t.abs().max()) == 0 for n, t in trained(run).items() if "lora_B" in n)


@pytest.mark.parametrize(("tuner", "value"), [("lora", "adapter"), ("lora", "head"), ("full", "adapter")])
def test_a_fresh_value_starts_at_the_mean_score(folder: Path, tuner: str, value: str) -> None:
    """A value that guesses makes noise of the first advantages: its explained variance is then far below 0."""
    run = ppo(*GOLD, "ppo.iterations=1", f"ppo.value={value}", "--plugin", tuner, "train.learning_rate=1e-9")
    saved = load_file(next(run.glob("checkpoints/*/trained.safetensors")))
    (bias,) = (tensor for name, tensor in saved.items() if name.endswith(("value.bias", "score.bias")))
    first = iterations(run)[0]

    assert first["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert float(bias) == pytest.approx(first["score"] - (1 - first["eos_rate"]), abs=1e-5)  # missing_eos_penalty is 1


def test_an_answer_that_did_not_end_is_penalised(folder: Path) -> None:
    """With all answers cut off, the penalty shifts every return, at whose mean the value starts."""
    plain = ppo(*GOLD, "ppo.iterations=1", "ppo.missing_eos_penalty=0", "ppo.response_length=2", "--output", "plain")
    other = ppo(*GOLD, "ppo.iterations=1", "ppo.missing_eos_penalty=5", "ppo.response_length=2", "--output", "other")

    assert iterations(plain)[0]["score"] == iterations(other)[0]["score"]
    biases = [
        load_file(next(run.glob("checkpoints/*/trained.safetensors")))["heads.value.bias"] for run in (plain, other)
    ]
    assert float(biases[0] - biases[1]) == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("gold:broken", "reward 'function' failed on the answer"),
        ("gold:few", "reward 'function' gave 1 scores for 4 answers, the first of which is"),
        ("gold:nan", "reward 'function' gave nan for the answer"),
        ("gold:none", "gold has no function none"),
    ],
)
def test_a_bad_reward_stops_the_run_with_its_name(
    folder: Path, call: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ppo.policy=base", "reward.name=function", f"reward.call={call}", "ppo.iterations=1"]

    assert main(["train", "--plugin", "ppo", *SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_rewards_are_added_with_weights(below: Callable[[str], list[str]]) -> None:
    named = below("lora")
    rm = ppo(*named, "ppo.iterations=1", "--output", "rm")
    gold = ppo(*named[:3], "reward.name=function", "reward.call=gold:letters", "ppo.iterations=1", "--output", "gold")
    parts = "[{name: reward-model, weight: 2}, {name: function, call: 'gold:letters', weight: -3}]"
    both = ppo(*named, "reward.name=sum", f"reward.parts={parts}", "ppo.iterations=1", "--output", "both")
    a, b, c = (iterations(run)[0]["score"] for run in (rm, gold, both))

    assert c == pytest.approx(2 * a - 3 * b, abs=1e-4)


def test_any_classifier_is_a_reward_in_its_own_tokens(folder: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model("gpt2"), num_labels=3)
    classifier.config.pad_token_id = 5
    classifier.save_pretrained("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gpt2"))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained("classifier")
    settings = ["ppo.policy=base", "reward.name=classifier", "reward.model=classifier", "ppo.iterations=1"]
    two, one = (ppo(*settings, f"reward.label={label}", "--output", str(label)) for label in (2, 1))

    assert iterations(two)[0]["score"] != iterations(one)[0]["score"]


def test_answers_before_and_after_stand_side_by_side(folder: Path) -> None:
    run = ppo(*GOLD, "ppo.iterations=2")
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "alignkit.json").read_text())["metrics"]

    assert len(rows) == 4
    assert set(rows[0]) == {"prompt", "before", "after", "score"}
    assert {"first_eval_score", "eval_score", "eval_kl", "eval_length", "eval_eos_rate"} <= set(metrics)
    assert metrics["first_eval_kl"] == 0


def test_a_classifier_without_a_pad_token_scores_batches(folder: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_model("llama"), num_labels=1).save_pretrained("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained("classifier")

    settings = ["ppo.policy=base", "reward.name=classifier", "reward.model=classifier", "ppo.iterations=1"]
    both, alone = (ppo(*settings, f"reward.batch={n}", "--output", f"batch-{n}") for n in (4, 1))
    assert iterations(both)[0]["score"] == pytest.approx(iterations(alone)[0]["score"], abs=1e-3)


def test_a_run_that_had_only_to_be_finished_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its last checkpoint: no step more, and the same weights."""
    from alignkit.training import execution

    def killed(*arguments: Any) -> None:
        raise GeneratorExit  # which nothing handles

    settings = [*GOLD, "ppo.iterations=2", "ppo.ema=0.5"]
    whole = ppo(*settings, "--output", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(execution, "save", killed)
        with pytest.raises(GeneratorExit):
            ppo(*settings, "--output", "cut")
    assert Path("cut/ppo.unfinished/checkpoints/checkpoint-4").is_dir()
    resumed = ppo(*settings, "--resume", "--output", "cut")

    assert json.loads((resumed / "alignkit.json").read_text())["steps"] == 4
    assert all(torch.equal(t, trained(resumed)[n]) for n, t in trained(whole).items())
    assert (resumed / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_killed_and_resumed_is_bit_for_bit_the_same(folder: Path, tuner: str) -> None:
    settings = [*GOLD, "--plugin", tuner, "ppo.iterations=4", "ppo.ema=0.9", "ppo.kl_target=1", "ppo.epochs=2"]
    whole = ppo(*settings, "--output", "whole")
    cut = ppo(*settings, "--output", "cut")
    (cut / "alignkit.json").unlink()
    for checkpoint in (cut / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 12:
            shutil.rmtree(checkpoint)
    assert list((cut / "checkpoints").glob("checkpoint-12"))
    cut.rename(cut.with_name("ppo.unfinished"))
    resumed = ppo(*settings, "--resume", "--output", "cut")

    assert all(torch.equal(t, trained(resumed)[n]) for n, t in trained(whole).items())
    timing = ("seconds", "per_second", "epoch")  # the Trainer's epoch has no meaning here
    for a, b in zip(iterations(whole), iterations(resumed), strict=True):
        assert {k: v for k, v in a.items() if not any(t in k for t in timing)} == {
            k: v for k, v in b.items() if not any(t in k for t in timing)
        }


@pytest.mark.parametrize("moment", ["scoring", "saving"])
def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(folder: Path, moment: str) -> None:
    """``kill -9`` in the middle of an iteration's rollouts, and (often) in the middle of writing a checkpoint."""
    Path("slow.py").write_text(
        "import os, pathlib, time, gold\n"
        "def letters(prompts, answers):\n"
        "    done = list(pathlib.Path('cut/ppo.unfinished/checkpoints').glob('checkpoint-*/trainer_state.json'))\n"
        "    if os.environ.get('SLOW') and len(done) > 1:\n"
        "        pathlib.Path('here').touch()\n"
        "        time.sleep(60)\n"
        "    return gold.letters(prompts, answers)\n"
    )
    settings = ["ppo.policy=base", "reward.name=function", "reward.call=slow:letters", "ppo.iterations=4"]
    whole = trained(ppo(*settings, "--output", "whole"))

    command = [sys.executable, "-m", "alignkit", "train", "--plugin", "ppo", *SMALL, *settings, "--output", "cut"]
    env = {**os.environ, "SLOW": "1" if moment == "scoring" else ""}
    checkpoints = Path("cut/ppo.unfinished/checkpoints")
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    while not (Path("here").exists() if moment == "scoring" else len(list(checkpoints.glob("checkpoint-*"))) > 1):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not Path("cut/ppo").exists()
    resumed = trained(ppo(*settings, "--output", "cut", "--resume"))

    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_two_processes_learn_what_one_learns(folder: Path, install: Callable[..., None]) -> None:
    """With answers that depend on the prompt alone, the step on eight answers is the same however they are spread."""
    install(
        "fixed",
        """
        from alignkit import Rollout, hookimpl

        @hookimpl
        def alignkit_rollout():
            return [Rollout(name="fixed", summary="", build=lambda config, tokenizer, sampling: answers)]

        def answers(policy, prompts):
            return [[(7 * i + sum(p)) % 500 + 1 for i in range(sum(p) % 9 + 2)] for p in prompts]
        """,
    )
    settings = [*GOLD, "--plugin", "fixed", "ppo.iterations=2", "ppo.minibatches=1", "data.eval_size=0"]
    settings += ["ppo.ptx_coef=0.5", "ppo.ptx_data=texts.jsonl", "ppo.ptx_batch_size=4", "ppo.batch_size=8"]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n}. " * n}) + "\n" for n in range(1, 6)))
    one = ppo(*settings, "--output", "one")
    done = on_two_processes("train", "--plugin", "ppo", *SMALL, *settings, "--output", "two")
    assert done.returncode == 0, done.stderr

    two = Path("two/ppo")
    assert json.loads((two / "alignkit.json").read_text())["processes"] == 2
    assert iterations(two)[0]["ratio"] == pytest.approx(1, abs=1e-5)
    for name, tensor in trained(one).items():
        torch.testing.assert_close(trained(two)[name], tensor, rtol=1e-3, atol=1e-5)
    for a, b in zip(iterations(one), iterations(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {n for n in a if "seconds" in n or n == "sampled_tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


# --- rollout engines -------------------------------------------------------------------------------------------------


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


# --- the trunk -------------------------------------------------------------------------------------------------------


def roles_of(arguments: list[str]) -> tuple[Any, Roles]:
    """A run and its roles, in fp32, as the stage makes them."""
    from alignkit.cli.common import read_arguments
    from alignkit.models import assemble
    from alignkit.runs.plan import pipeline
    from alignkit.training.run import Run

    plugins = ["ppo", *(a for a in arguments if a in ("full", "lora", "qlora"))]
    settings = [a for a in arguments if "=" in a]
    asked = read_arguments(plugins, None, "base", "prompts.jsonl", "runs", [*settings, "train.bf16=false"])
    run = Run(pipeline(*asked).to_train[-1], print)
    return run, assemble(run, value="adapter", temperature=1.0).eval()


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_the_reward_in_ppo_is_the_number_of_alignkit_score(
    below: Callable[[str], list[str]], tuner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.generation.scoring import Scorer
    from alignkit.models import device
    from alignkit.runs import manifest

    run, roles = roles_of(below(tuner))
    monkeypatch.setattr(device, "run_dtype", lambda train: torch.float32)
    folder = Path(f"below-{tuner}/rm")
    scorer = Scorer(folder, manifest.read(folder))
    encoded = [scorer.encode([{"role": "user", "content": f"p{n}"}], "e " * n + "b") for n in range(4)]
    answers = Sequences.of(
        [e.prompt for e in encoded], [e.answers[0] for e in encoded], run.tokenizer.pad_token_id, "cpu"
    )

    with torch.no_grad():
        scores = roles(answers, ("reward",))["reward"].tolist()
    assert scores == pytest.approx(scorer.scores(encoded, 2), abs=1e-4)


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
