"""Sums and ensembles of reward models, and what is checked of them before anything is trained."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_runs import answers_of, plain_scores, refused, run_of

from alignkit import DataError, PluginError
from alignkit.cli import main
from alignkit.generation import rewards

# --- sums and ensembles ----------------------------------------------------------------------------------------------

HALF = "[{name: reward-model, path: %s/rm, weight: 0.5}, {name: reward-model, path: %s/rm, weight: 0.25}]"


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_sum_of_two_reward_models_adds_their_weighted_scores(reward_runs: Path, tuner: str) -> None:
    run, score = run_of(tuner, "reward.name=sum", f"reward.parts={HALF % (f'{tuner}-a', f'{tuner}-b')}")
    answers = answers_of(run)
    a, b = (plain_scores(f"{tuner}-{which}/rm", answers) for which in "ab")

    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.5
    assert score(answers) == pytest.approx([0.5 * x + 0.25 * y for x, y in zip(a, b, strict=True)], abs=1e-4)
    assert run.config.reward.config.parts[1]["path"] == f"{tuner}-b/rm"
    assert {str(run.parents[role]) for role in ("reward", "reward_2")} == {f"{tuner}-a/rm", f"{tuner}-b/rm"}
    assert len([name for name in run.surroundings() if "reward" in name]) == 2  # --resume looks at both


def test_a_run_with_two_reward_models_is_recorded_and_known_again(
    reward_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config that it recorded makes the same run."""
    parts = HALF % ("lora-a", "lora-b")
    given = [
        "--plugin",
        "lora",
        "--model",
        "base",
        "--data",
        "prompts.jsonl",
        "ppo.policy=lora/sft",
        "ppo.iterations=1",
    ]
    given += [
        "ppo.batch_size=4",
        "ppo.minibatches=1",
        "ppo.response_length=4",
        "data.eval_size=2",
        "train.use_cpu=true",
    ]
    given += ["reward.name=sum", f"reward.parts={parts}"]
    assert main(["train", "--plugin", "ppo", "--output", "out", *given]) == 0
    manifest = json.loads(Path("out/ppo/alignkit.json").read_text())

    assert {Path(manifest["parents"][role]["folder"]).parent.name for role in ("reward", "reward_2")} == {
        "lora-a",
        "lora-b",
    }
    for again in (["--output", "out", *given], ["--config", "out/ppo/config.yaml"]):
        capsys.readouterr()
        assert main(["train", "--plugin", "ppo", *again]) == 0
        assert "nothing to train: a finished run with these settings exists" in capsys.readouterr().out


def combined(by: str, scores: tuple[float, ...]) -> float:
    if by == "mean-std":
        return statistics.fmean(scores) - 0.5 * statistics.pstdev(scores)
    return min(scores) if by == "min" else statistics.fmean(scores)


@pytest.mark.parametrize("by", ["mean", "min", "mean-std"])
def test_an_ensemble_is_combined_as_asked(reward_runs: Path, by: str) -> None:
    more = ["reward.std_coef=0.5"] if by == "mean-std" else []
    run, score = run_of("lora", "reward.name=ensemble", "reward.paths=[lora-a/rm, lora-b/rm]", f"reward.by={by}", *more)
    answers = answers_of(run)
    scores = zip(*(plain_scores(f"lora-{which}/rm", answers) for which in "ab"), strict=True)

    assert score(answers) == pytest.approx([combined(by, each) for each in scores], abs=1e-4)


def test_a_member_of_an_ensemble_without_a_finite_score_is_an_error(
    reward_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min([1.0, nan]) is 1.0."""
    broken = {"lora-a/rm": 1.0, "lora-b/rm": math.nan}
    monkeypatch.setattr(
        rewards, "of_role", lambda run, path: lambda answers, roles=None: [broken[path]] * len(answers.texts)
    )
    run, score = run_of("lora", "reward.name=ensemble", "reward.paths=[lora-a/rm, lora-b/rm]", "reward.by=min")

    with pytest.raises(DataError, match="the reward model in lora-b/rm returned nan for the answer 'e e e'"):
        score(answers_of(run))


def weights(model: Any) -> int:
    return sum({p.data_ptr(): p.numel() for n, p in model.named_parameters() if "lora_" not in n}.values())


@pytest.mark.parametrize(
    ("policy", "rewards", "planned", "models"),
    [
        ("lora", "lora", "policy, reference, value, reward, reward_2 on one base", 1),
        ("full", "lora", "policy, reference, value: a model each, reward, reward_2 on a base of their own", 4),
        ("lora", "full", "policy, reference, value on one base, reward by itself, reward_2 by itself", 3),
    ],
)
def test_reward_models_share_a_base_where_they_can(
    reward_runs: Path, policy: str, rewards: str, planned: str, models: int
) -> None:
    from transformers import AutoModelForCausalLM

    paths = f"reward.paths=[{rewards}-a/rm, {rewards}-b/rm]"
    run, score = run_of(policy, "reward.name=ensemble", paths, "reward.by=mean")
    answers = answers_of(run)
    a, b = (plain_scores(f"{rewards}-{which}/rm", answers) for which in "ab")

    assert dict(run.plan.describe())["in memory"] == planned
    roles = score.keywords["roles"]
    assert len(roles.models) == models
    one = weights(AutoModelForCausalLM.from_pretrained("base"))
    assert weights(roles) < (models + 0.5) * one
    assert score(answers) == pytest.approx([statistics.fmean(both) for both in zip(a, b, strict=True)], abs=1e-4)


def test_a_reward_model_that_gets_no_roles_is_an_error(reward_runs: Path) -> None:
    run, _ = run_of("lora", "reward.path=lora-a/rm")

    with pytest.raises(PluginError, match=r"the reward model in lora-a/rm was called without roles"):
        run.reward()(answers_of(run))


def test_a_part_without_a_path_takes_that_of_the_sum(reward_runs: Path) -> None:
    parts = "[{name: reward-model}, {name: sum, parts: [{name: reward-model, weight: 2}], weight: 3}]"
    run, score = run_of("lora", "reward.name=sum", "reward.path=lora-b/rm", f"reward.parts={parts}")
    answers = answers_of(run)

    assert list(run.parents) == ["policy", "reward"]
    assert score(answers) == pytest.approx([7 * x for x in plain_scores("lora-b/rm", answers)], abs=1e-3)


def test_rewards_compute_on_the_device_of_the_run(reward_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run says which it is; that there is CUDA says nothing of it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: None)
    run, score = run_of("lora", "reward.path=lora-a/rm", "train.use_cpu=false")
    answers = answers_of(run)
    plain = plain_scores("lora-a/rm", answers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert score(answers) == pytest.approx(plain, abs=1e-4)


def test_a_run_computes_on_whatever_accelerator_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.models.device_and_dtype import run_device

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert run_device({}).type == "mps"
    assert run_device({"use_cpu": True}).type == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert run_device({}).type == "cpu"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("[{name: reward-modle}]", "Did you mean 'reward-model'"),
        ("[{weight: 2}]", "reward.parts[0] must name a reward"),
        ("[{name: reward-model, pth: a}]", "unknown key reward.parts[0].pth. Did you mean 'path'"),
        ("[{name: reward-model}, {name: classifier}]", "reward 'classifier' needs reward.model"),
        ("[{name: function, call: 'os:nothing'}]", "os has no function nothing"),
        ("[{name: reward-model, weight: much}]", "reward.parts[0].weight must be a number, not 'much'"),
        ("[{name: reward-model, path: lora/sft}]", "reward.parts[0].path: lora/sft is a policy"),
        ("[{name: sum, parts: [{name: needy}]}]", "reward 'needy' needs nowhere_to_be_found, which is not installed"),
    ],
)
def test_the_parts_of_a_sum_are_checked_before_anything_is_trained(
    reward_runs: Path, parts: str, said: str, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    install(
        "extra",
        """
        from alignkit import Reward, hookimpl

        @hookimpl
        def alignkit_reward():
            return [Reward(name="needy", summary="", requires=("nowhere_to_be_found",), build=lambda config, run: None)]
        """,
    )
    assert said in refused(capsys, "--plugin", "extra", "reward.name=sum", f"reward.parts={parts}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["reward.paths=[lora-a/rm]"], "needs reward.paths: two or more different run folders"),
        (["reward.paths=[lora-a/rm, lora-a/rm]"], "needs reward.paths: two or more different run folders"),
        (["reward.paths=[lora-a/rm, lora/sft]"], "reward.paths: lora/sft is a policy (stage sft), not a reward"),
        (["reward.paths=[lora-a/rm, lora-b/rm]", "reward.std_coef=2"], "has no effect without reward.by=mean-std"),
    ],
)
def test_an_ensemble_is_checked_before_anything_is_trained(
    reward_runs: Path, settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "reward.name=ensemble", *settings)
