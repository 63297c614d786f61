"""What online stages share: KL, whitening, checks of the first step, warnings, and a stage of the docs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from ppo_runs import GOLD, ONES, SMALL, iterations, policy_batch, ppo, trained

from alignkit import AlignkitError, SampledAnswers
from alignkit.cli import main
from alignkit.models import Roles, Sequences
from alignkit.online import diagnosis, kl
from alignkit.online.collect import Collector
from alignkit.online.microbatches import by_length, shuffled
from alignkit.online.statistics import Statistics


def test_whitening_is_over_tokens() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    statistics = Statistics(accelerate.Accelerator(cpu=True))

    torch.testing.assert_close(statistics.whiten(values, mask), torch.tensor([[-1.0, 1.0, 0.0]]))
    torch.testing.assert_close(statistics.whiten(values, mask, shift=False), torch.tensor([[1.0, 3.0, 0.0]]))


def test_the_adaptive_coefficient_moves_by_a_fifth_at_most() -> None:
    assert kl.next_kl_coef(0.1, kl=6.6, target=6, answers=1000, horizon=10000) == pytest.approx(0.1 * 1.01)
    assert kl.next_kl_coef(0.1, kl=99, target=6, answers=1000, horizon=10000) == pytest.approx(0.1 * 1.02)
    assert kl.next_kl_coef(0.1, kl=0, target=6, answers=1000, horizon=10000) == pytest.approx(0.1 * 0.98)


def test_what_commonly_goes_wrong_is_warned_of_once() -> None:
    said: list[str] = []
    first = {"entropy": 2.0, "eos_rate": 0.8, "length": 20.0, "score": 0.0}
    watch = diagnosis.FailureSigns("ppo", said.append, expect_eos=True)
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
    refused = replace(batch, mask=torch.zeros_like(batch.mask))
    assert diagnosis.check_first_step(refused, model, True, recompute=lambda: batch.logps) is None
    with pytest.raises(AlignkitError, match="dropout is on in 0"):
        diagnosis.check_first_step(
            batch, torch.nn.Sequential(torch.nn.Dropout(0.1)), True, recompute=lambda: batch.logps
        )
    other = policy_batch([1.1], [0.0], [0.0], [0.0])
    with pytest.raises(AlignkitError, match="not deterministic"):
        diagnosis.check_first_step(other, model, True, recompute=lambda: other.logps)


def test_in_16_bits_a_difference_between_shapes_is_rounding_and_one_between_calls_is_not() -> None:
    model, batch = torch.nn.Linear(1, 1), policy_batch([1.05], [0.0], [0.0], [0.0])
    line = diagnosis.check_first_step(batch, model, False, recompute=lambda: batch.logps)
    assert line is not None
    assert "differ by 0.049 per token between batches of different shapes" in line
    with pytest.raises(AlignkitError, match="not deterministic"):
        diagnosis.check_first_step(batch, model, False, recompute=lambda: batch.old_logps)
    far = policy_batch([1.5], [0.0], [0.0], [0.0])
    with pytest.raises(AlignkitError, match="not deterministic"):  # far too much for rounding
        diagnosis.check_first_step(far, model, False, recompute=lambda: far.logps)


def test_the_stage_of_the_docs_trains(
    folder: Path, run_stage: Callable[..., Path], install: Callable[..., None]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "stages.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "online_stage(" in code]
    install("baseline", code)
    gold = ["baseline.reward.name=function", "baseline.reward.call=gold:letters", "baseline.policy=base"]
    small = ["baseline.batch_size=8", "baseline.minibatches=2", "baseline.response_length=6", "train.max_steps=4"]
    run = run_stage("baseline", "--model", "base", *gold, *small)
    metrics = iterations(run)

    assert len(metrics) == 2
    assert all("clip_fraction" in line and "value_loss" not in line for line in metrics)
    assert metrics[0]["kl"] == 0
    assert metrics[1]["kl"] != 0


def test_microbatches_are_of_about_equal_length_and_keep_the_answers_to_a_prompt_together() -> None:
    lengths = [9, 3, 7, 5, 2, 8]

    assert list(by_length(range(6), lengths, group=1, size=2)) == [[0, 5], [2, 3], [1, 4]]
    assert list(by_length([1, 2, 3, 4, 5], lengths, group=2, size=2)) == [[4, 5], [2, 3], [1]]
    order = shuffled(6, 3, torch.Generator().manual_seed(0))
    assert order in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2])
    assert sorted(shuffled(6, 1, torch.Generator().manual_seed(0))) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("tuner", ["lora", "full", "qlora"])
def test_a_prompt_that_is_computed_once_for_its_answers_trains_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str], tuner: str
) -> None:
    """One step on four answers to each of two prompts, with and without."""
    settings = ["ppo.samples_per_prompt=4", "ppo.minibatches=1", "ppo.iterations=1", "--plugin", tuner, *GOLD]
    runs = {}
    for shared in ("true", "false"):
        run = ppo(*settings, f"ppo.shared_prompt={shared}", "--output", f"shared-{shared}")
        runs[shared] = trained(run), iterations(run)[0]
        assert ("shared prompt: each prompt is computed" in capsys.readouterr().out) == (shared == "true")
    (with_tree, metrics), (without, expected) = runs["true"], runs["false"]

    assert metrics["kl"] == pytest.approx(expected["kl"], abs=1e-6)
    for name in ("score", "entropy", "policy_loss", "value_loss", "explained_variance", "clip_fraction"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert with_tree.keys() == without.keys()
    assert all(torch.allclose(with_tree[name], without[name], atol=2e-5) for name in without)


def test_a_shared_prompt_without_several_answers_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--plugin", "ppo", *SMALL, *GOLD, "ppo.shared_prompt=true"]) == 2
    assert "ppo.shared_prompt has no effect without ppo.samples_per_prompt of 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "reused"),
    [("ppo.value=adapter", True), ("ppo.value=head", False), ("ppo.rollout.name=generate", False)],
)
def test_log_probabilities_of_the_engine_replace_a_forward_pass_that_agrees_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, reused: bool
) -> None:
    """From the second iteration on, when the policy has been updated. They differ from the pass by rounding alone."""
    scored: list[list[str]] = []
    forward, collect = Collector.forward_roles, Collector.collect

    def watched(self: Collector, prompts: Any, answers: Any, roles: Any) -> Any:
        scored.append(list(roles))
        return forward(self, prompts, answers, roles)

    def compared(self: Collector, iteration: int) -> Any:
        rollouts = collect(self, iteration)
        logps = forward(self, rollouts.prompts, rollouts.answers, ["policy"])["policy"]
        torch.testing.assert_close(rollouts.logps, logps, atol=2e-4, rtol=0)
        return rollouts

    monkeypatch.setattr(Collector, "forward_roles", watched)
    monkeypatch.setattr(Collector, "collect", compared)
    ppo(*GOLD, setting, "ppo.iterations=2", "data.eval_size=0")

    assert ["policy" in roles for roles in scored] == [True, not reused]
    assert ("from now on they replace it in scoring" in capsys.readouterr().out) == reused


def test_log_probabilities_of_an_engine_that_are_wrong_are_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Collector.sample

    def wrong(self: Collector, *arguments: Any) -> SampledAnswers:
        answers = sample(self, *arguments)
        return SampledAnswers(answers, [[logp - 0.1 for logp in logps] for logps in answers.logps or []])

    monkeypatch.setattr(Collector, "sample", wrong)
    run = ppo(*GOLD, "ppo.iterations=2", "data.eval_size=0")

    assert "differ by 0.1 per token from the policy's forward pass: they are not used" in capsys.readouterr().out
    assert iterations(run)[0]["kl"] == 0


def test_a_reward_model_on_the_policys_base_shares_prompts_too(
    below: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward's rows are as few as there are prompts, and its scores are those without sharing."""
    rows, scores = dict[str, list[int]](), dict[str, float]()
    forward = Roles.forward

    def counted(self: Roles, sequences: Sequences, roles: Any, temperature: float | None = None) -> Any:
        if list(roles) == ["reward"]:
            rows[shared].append(len(sequences.input_ids))
        return forward(self, sequences, roles, temperature)

    monkeypatch.setattr(Roles, "forward", counted)
    arguments = below("lora")
    for shared in ("true", "false"):
        rows[shared] = []
        settings = ["ppo.samples_per_prompt=4", f"ppo.shared_prompt={shared}", "ppo.iterations=1", "data.eval_size=0"]
        run = ppo(*arguments, *settings, "--output", f"reward-{shared}")
        scores[shared] = iterations(run)[0]["score"]

    assert sum(rows["true"]) <= 2
    assert sum(rows["false"]) == 8
    assert scores["true"] == pytest.approx(scores["false"], abs=1e-4)
