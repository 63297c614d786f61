"""Runs of GRPO and its presets: tuners, the loss beside TRL's, drawing again, learning, exact resume, processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes
from ppo_runs import GOLD, LEARN, SMALL, iterations, logs, trained

from alignkit import SampledAnswers
from alignkit.cli import main
from alignkit.cli.common import read_arguments
from alignkit.online import OnlineTrainer, Rollouts
from alignkit.online.collect import Collector
from alignkit.runs.plan import pipeline
from alignkit.training.run import Run


def words(stage: str, *arguments: str) -> list[str]:
    """The words of a small run; settings of ``ppo`` are those of the stage."""
    settings = [*SMALL, f"{stage}.samples_per_prompt=4", *arguments]
    return ["--debug", "train", "--plugin", stage, *(s.replace("ppo.", f"{stage}.", 1) for s in settings)]


def grpo(*arguments: str, stage: str = "grpo") -> Path:
    assert main(words(stage, *arguments)) == 0
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs"
    return Path(output) / stage


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_grpo_runs_on_sft_and_reward_of_every_tuner(
    below: Callable[[str], list[str]], tuner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what PPO has beside its value function: PPO-ptx, an adaptive KL coefficient, and the best policy."""
    named = below(tuner)
    capsys.readouterr()
    beside = ["ppo.ptx_coef=0.5", "ppo.kl_target=0.01", "ppo.kl_horizon=100", "ppo.keep=best", "ppo.eval_every=1"]
    run = grpo(*named, "ppo.iterations=2", *beside)
    first, second = iterations(run)
    manifest = json.loads((run / "alignkit.json").read_text())
    output = capsys.readouterr().out

    assert first["kl"] == 0
    assert second["kl"] != 0
    assert {"score", "kl_coef", "entropy", "clip_fraction", "approx_kl", "equal_scores", "eos_rate"} <= set(first)
    assert not {"value_loss", "explained_variance"} & set(first)
    assert set(manifest["parents"]) == {"policy", "reward"}
    assert not any("value" in name or "score" in name or "reference" in name for name in trained(run))
    assert first["ptx_loss"] > 0
    assert abs(first["ptx_grad_norm"] - first["grpo_grad_norm"]) < first["grad_norm"]
    assert (first["kl_coef"], second["kl_coef"]) == (0.05, pytest.approx(0.05 * (1 - 0.2 * 8 / 100)))
    evaluated = [line["eval_score"] for line in logs(run) if "eval_score" in line]
    assert manifest["metrics"]["eval_score"] == max(evaluated[:3]) == evaluated[3]
    in_memory = "reward: a model each" if tuner == "full" else "policy, reference, reward on one base"
    assert in_memory in output


@pytest.mark.parametrize("stage", ["grpo", "dr-grpo", "rloo"])
def test_it_learns_what_a_function_rewards(folder: Path, stage: str) -> None:
    run = grpo(*LEARN, "ppo.iterations=20", "ppo.kl_coef=0", stage=stage)
    metrics = json.loads((run / "alignkit.json").read_text())["metrics"]

    assert metrics["eval_score"] > metrics["first_eval_score"] + 0.3


ACTS = [
    *("grpo.aggregate=sequence", "grpo.aggregate=constant"),
    *("grpo.advantage=group-mean", "grpo.advantage=leave-one-out", "grpo.advantage=batch"),
    *("grpo.kl=score", "grpo.kl=loss"),
    *(f"grpo.kl=loss grpo.kl_estimator={name}" for name in ("k1", "k2", "k3-plain")),
    *("loss.cliprange=0.001", "loss.cliprange_high=0.001", "loss.entropy_coef=1", "--plugin=reinforce"),
    "--plugin=ppo-dual-clip loss.dual_clip=1.001",
]


def run_of(*arguments: str) -> Run:
    """A run that is ready to train, with reward ``gold:letters``."""
    plugins = [argument.removeprefix("--plugin=") for argument in arguments if argument.startswith("--plugin=")]
    settings = [setting.replace("ppo.", "grpo.", 1) for setting in [*SMALL, *GOLD] if "=" in setting]
    settings += ["grpo.samples_per_prompt=4", "data.eval_size=0", *(a for a in arguments if not a.startswith("--"))]
    asked = read_arguments(["grpo", *plugins], None, "base", ["prompts.jsonl"], "runs", settings)
    return Run(pipeline(*asked).to_train[-1], print)


def move(trainer: OnlineTrainer, by: float) -> None:
    for _, weight in trainer.policy_weights():
        weight.data += by * torch.randn_like(weight)


def gradient(trainer: OnlineTrainer) -> torch.Tensor:
    """The gradient of an optimizer step."""
    trainer.model.zero_grad()
    size = trainer.args.gradient_accumulation_steps
    batches, tokens = trainer.get_batch_samples(trainer.get_train_dataloader(), size, "cpu")
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens).backward()
    return torch.cat([weight.grad.flatten() for _, weight in trainer.policy_weights()])


def test_every_setting_acts(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No two of the settings have the same gradient, on one batch from a policy that has moved since."""
    run = run_of()
    Path(run.folder).mkdir(parents=True)
    trainer = run.config.stage.component.build(run)
    trainer.state.global_step = trainer.config.steps  # the second iteration: the policy is not the reference anymore
    sample = trainer.collector.sample

    def ragged(*args: Any) -> SampledAnswers:
        return SampledAnswers([answer[: 12 - number] for number, answer in enumerate(sample(*args))])

    monkeypatch.setattr(trainer.collector, "sample", ragged)
    torch.manual_seed(0)
    move(trainer, 0.02)
    rollouts = trainer.collector.collect(1)
    monkeypatch.setattr(trainer.collector, "collect", lambda iteration: rollouts)
    move(trainer, 0.002)
    gradients = {}
    for setting in ["", *ACTS]:
        of_setting = run_of("grpo.kl_coef=0.5", *setting.split())
        trainer.config, trainer.kl_coef, trainer.loss = of_setting.config.stage.config, 0.5, of_setting.loss()
        gradients[setting] = gradient(trainer)

    assert all(each.isfinite().all() and each.any() for each in gradients.values())
    same = [(a, b) for a in gradients for b in gradients if a < b and torch.equal(gradients[a], gradients[b])]
    assert same == []
    capsys.readouterr()
    for _ in range(2):
        trainer.estimate_advantages(dataclasses.replace(rollouts, scores=torch.ones(8)))
    assert capsys.readouterr().out.count("warning: in every group, all answers have the same score") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["grpo.samples_per_prompt=1"], "grpo.samples_per_prompt: Input should be greater than or equal to 2 (got 1)"),
        (["grpo.batch_size=6"], "grpo.batch_size must be a multiple of grpo.samples_per_prompt"),
        (["grpo.minibatches=3"], "grpo.batch_size=8 cannot be split into grpo.minibatches=3"),
        (["train.per_device_train_batch_size=3"], "microbatches (train.per_device_train_batch_size=3, 1 processes)"),
        (["grpo.keep=best", "data.eval_size=0"], "grpo.keep=best needs held-out prompts: set data.eval_size"),
        (["grpo.kl_estimator=k2"], "grpo.kl_estimator has no effect without grpo.kl=loss"),
        (["grpo.advantage=mean"], "grpo.advantage: Input should be 'group', 'group-mean', 'leave-one-out' or 'batch'"),
        (["reward.name=function", "reward.call=null"], "reward 'function' needs reward.call=module:function"),
        (["grpo.gamma=0.9"], "unknown key grpo.gamma"),
    ],
)
def test_check_refuses_settings_that_cannot_be(
    folder: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words("grpo", *GOLD, *settings)[2:]]) == 2
    assert message in capsys.readouterr().err


UNEVEN = """
def number(prompt):
    return int(prompt.split()[2])

def scores(prompts, answers):  # equal in every group of an even number
    return [0.5 if number(prompt) % 2 == 0 else float(place) for place, prompt in enumerate(prompts)]

def picky(prompts, answers):
    if any(number(prompt) % 4 == 0 for prompt in prompts):
        raise ValueError("no multiples of four")
    return scores(prompts, answers)
"""


@pytest.mark.parametrize("call", ["scores", "picky"])
def test_groups_of_equal_scores_are_replaced_by_answers_to_other_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    """What replaces them is whole: prompts, answers, scores and log-probabilities belong together."""
    Path("uneven.py").write_text(UNEVEN)
    drawn: list[Rollouts] = []
    collect = Collector.collect

    def watched(self: Collector, iteration: int) -> Rollouts:
        rollouts = collect(self, iteration)
        logps = self.forward_roles(rollouts.prompts, rollouts.answers, ["policy"])["policy"]
        torch.testing.assert_close(rollouts.logps, logps, atol=2e-4, rtol=0)
        drawn.append(rollouts)
        return rollouts

    monkeypatch.setattr(Collector, "collect", watched)
    settings = ["ppo.policy=base", "reward.name=function", f"reward.call=uneven:{call}", "reward.on_error=skip"]
    settings += ["ppo.batch_size=16", "ppo.iterations=3", "ppo.missing_eos_penalty=0", "data.eval_size=2"]
    never, often = (iterations(grpo(*settings, f"ppo.redraws={n}", "--output", str(n))) for n in (0, 4))

    assert capsys.readouterr().out.count("from now on they replace it in scoring") == 2  # also after drawing again
    assert not any("redrawn" in line for line in never)
    assert all(4 <= line.get("redrawn", 4) <= 16 for line in often)  # each answer once, however often it is replaced
    assert any("redrawn" in line for line in often)
    assert sum(line["equal_scores"] for line in often) < sum(line["equal_scores"] for line in never) / 2
    for rollouts in drawn[3:]:
        groups = rollouts.scores.view(-1, 4), rollouts.kept.view(-1, 4)
        assert all(len({tuple(prompt) for prompt in rollouts.prompts[n : n + 4]}) == 1 for n in range(0, 16, 4))
        spread = [len(set(scores.tolist())) == 4 for scores, kept in zip(*groups, strict=True) if kept.all()]
        assert sum(spread) >= 2


def test_cut_off_and_resumed_is_bit_for_bit_the_same(folder: Path) -> None:
    settings = [*GOLD, "ppo.iterations=4", "ppo.ema=0.9", "ppo.kl_target=1", "ppo.epochs=2"]
    settings += ["ppo.redraws=2", "ppo.kl=loss", "ppo.aggregate=sequence"]
    whole = grpo(*settings, "--output", "whole")
    cut = grpo(*settings, "--output", "cut")
    (cut / "alignkit.json").unlink()
    for checkpoint in (cut / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 12:
            shutil.rmtree(checkpoint)
    assert list((cut / "checkpoints").glob("checkpoint-12"))
    cut.rename(cut.with_name("grpo.unfinished"))
    resumed = grpo(*settings, "--resume", "--output", "cut")

    assert all(torch.equal(t, trained(resumed)[n]) for n, t in trained(whole).items())
    timing = ("seconds", "per_second", "epoch")  # the Trainer's epoch has no meaning here
    for a, b in zip(iterations(whole), iterations(resumed), strict=True):
        assert {k: v for k, v in a.items() if not any(t in k for t in timing)} == {
            k: v for k, v in b.items() if not any(t in k for t in timing)
        }


def test_two_processes_sample_and_learn_what_one_does(folder: Path) -> None:
    """In each iteration only one of the processes draws answers again: to prompt 8, then to prompt 1."""
    Path("length.py").write_text(
        "def length(prompts, answers):\n"
        "    numbers = [int(prompt.split()[2]) for prompt in prompts]\n"
        "    return [1.0 if n % 7 == 1 else len(answer) / 10 for n, answer in zip(numbers, answers)]\n"
    )
    settings = ["ppo.policy=base", "reward.name=function", "reward.call=length:length", "ppo.redraws=1"]
    settings += ["ppo.iterations=2", "data.eval_size=0", "ppo.advantage=batch", "ppo.kl=loss"]
    settings += ["ppo.aggregate=sequence", "ppo.epochs=2"]
    one = grpo(*settings, "--output", "one")
    done = on_two_processes(*words("grpo", *settings, "--output", "two")[1:])
    assert done.returncode == 0, done.stderr

    two = Path("two/grpo")
    assert json.loads((two / "alignkit.json").read_text())["processes"] == 2
    assert [line.get("redrawn") for line in iterations(two)] == [4, 4]
    for name, tensor in trained(one).items():
        torch.testing.assert_close(trained(two)[name], tensor, rtol=1e-3, atol=1e-5)
    for a, b in zip(iterations(one), iterations(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {n for n in a if "seconds" in n or n == "sampled_tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
