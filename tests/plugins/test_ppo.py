"""Runs of PPO: tuners, steps, evaluation, the policy that is kept, PPO-ptx, and settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ppo_runs import GOLD, LEARN, SMALL, iterations, logs, ppo, trained

from alignkit.cli import main
from alignkit.online.collect import Collector


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


def test_the_policy_of_the_best_evaluation_is_kept(folder: Path) -> None:
    """With a rate so large that it gets worse again, the run holds a policy from the middle."""
    settings = [*LEARN, "ppo.iterations=12", "ppo.kl_coef=0", "ppo.eval_every=1", "train.learning_rate=0.3"]
    last, best = (ppo(*settings, f"ppo.keep={which}", "--output", which) for which in ("last", "best"))
    evaluated = [line["eval_score"] for line in logs(last) if "eval_score" in line]

    assert max(evaluated) > evaluated[-1]
    assert json.loads((last / "alignkit.json").read_text())["metrics"]["eval_score"] == evaluated[-1]
    assert json.loads((best / "alignkit.json").read_text())["metrics"]["eval_score"] == max(evaluated)


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
    *(
        "ppo.epochs=2",
        "ppo.kl_target=0.01 ppo.kl_horizon=100",
        "ppo.samples_per_prompt=2",
        "loss.cliprange=0.001",
        "loss.value_coef=2",
    ),
    *(
        "loss.entropy_coef=1",
        "--plugin=ppo-dual-clip loss.dual_clip=1.001",
        "optimizer.name=adafactor",
        "train.warmup_steps=4",
    ),
    *("rollout.batch=3", "rollout.name=continuous"),
]


def test_every_setting_acts(folder: Path) -> None:
    plain = trained(ppo(*GOLD, "ppo.iterations=2", "data.eval_size=0", "--output", "plain"))
    for setting in ACTS:
        other = ppo(*GOLD, "ppo.iterations=2", "data.eval_size=0", "--output", "other", *setting.split())
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["ppo.ptx_data=prompts.jsonl"], "ppo.ptx_data has no effect without ppo.ptx_coef"),
        (["ppo.ptx_coef=1"], "ppo.ptx_coef: there is no text to train on. Set ppo.ptx_data"),
        (["ppo.minibatches=3"], "ppo.batch_size=8 cannot be split into ppo.minibatches=3"),
        (["train.per_device_train_batch_size=3"], "microbatches (train.per_device_train_batch_size=3, 1 processes)"),
        (["ppo.samples_per_prompt=3"], "ppo.batch_size must be a multiple of ppo.samples_per_prompt"),
        (["rollout.name=runs-on"], "continues after a stop token"),
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

    # the second iteration takes the log-probabilities of the engine, which differ by rounding
    assert [line["kl"] for line in iterations(run)] == [0, pytest.approx(0, abs=1e-5)]
    assert all(float(t.abs().max()) == 0 for n, t in trained(run).items() if "lora_B" in n)


def test_the_answers_of_every_evaluation_are_kept(folder: Path) -> None:
    run = ppo(*GOLD, "ppo.iterations=4")
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "alignkit.json").read_text())["metrics"]

    assert [row["step"] for row in rows] == [0] * 4 + [4] * 4 + [8] * 4  # every two iterations of two steps
    assert set(rows[0]) == {"step", "prompt", "answer", "score", "kl", "length", "ended"}
    for step, line in ((row["step"], row) for row in logs(run) if "eval_score" in row):
        at_step = [row for row in rows if row["step"] == step]
        assert [row["score"] for row in at_step] == [row["answer"].count("e") / 4 for row in at_step]
        for column, metric in (("score", "score"), ("kl", "kl"), ("length", "length"), ("ended", "eos_rate")):
            assert sum(row[column] for row in at_step) / 4 == pytest.approx(line[f"eval_{metric}"], rel=1e-4, abs=1e-6)
    assert {"first_eval_score", "eval_score", "eval_kl", "eval_length", "eval_eos_rate"} <= set(metrics)
    assert metrics["first_eval_kl"] == 0


def test_batches_of_held_out_prompts_draw_different_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal numbers, answers to different prompts are alike, and their mean varies more than its error says."""
    seeds: list[int] = []
    sample = Collector.sample
    monkeypatch.setattr(
        Collector,
        "sample",
        lambda self, prompts, seed, *rest: (seeds.append(seed), sample(self, prompts, seed, *rest))[1],
    )
    ppo(*GOLD, "ppo.iterations=1", "ppo.batch_size=4", "data.eval_size=8")

    assert len(set(seeds[:2])) == 2


def test_a_run_that_stopped_within_an_iteration_is_not_continued(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo(*GOLD, "ppo.minibatches=2", "ppo.epochs=1", "train.max_steps=3")
    assert "at most 3 steps" in capsys.readouterr().out

    with pytest.raises(AssertionError):
        ppo(*GOLD, "ppo.minibatches=2", "ppo.epochs=1", "train.max_steps=6", "--resume")
    assert "step 3 is in the middle of an iteration of 2 steps" in capsys.readouterr().err
