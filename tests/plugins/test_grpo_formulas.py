"""GRPO's formulas by hand, and its losses and their gradients beside those of TRL's trainers on the same tensors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import trl

from alignkit import PolicyBatch
from alignkit.online import Rollouts
from alignkit.online.statistics import Statistics
from alignkit_grpo import losses
from alignkit_grpo.advantages import relative_scores, token_weights, without_spread
from alignkit_grpo.kl import kl_estimate
from alignkit_grpo.trainer import GRPOTrainer

ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # two of four are right: the mean is 1/2 and the unbiased deviation 0.577350; (1 - 1/2) / 0.577450 is 0.865876
        ("group", [0.865876, -0.865876, -0.865876, 0.865876, 0.865951, -0.865951, -0.865951, 0.865951]),
        ("group-mean", [0.5, -0.5, -0.5, 0.5, 1, -1, -1, 1]),
        # 1 - (0 + 0 + 1) / 3, 0 - (1 + 0 + 1) / 3, ...; 3 - (1 + 1 + 3) / 3, ...
        ("leave-one-out", [2 / 3, -2 / 3, -2 / 3, 2 / 3, 4 / 3, -4 / 3, -4 / 3, 4 / 3]),
    ],
)
def test_scores_are_relative_to_their_group(advantage: Any, expected: list[float]) -> None:
    scores = torch.tensor([1.0, 0, 0, 1, 3, 1, 1, 3])

    torch.testing.assert_close(relative_scores(scores, ALL.repeat(2), 4, advantage), torch.tensor(expected))


SIGNS = SimpleNamespace(warn=lambda *_: None)


def test_batch_advantages_are_whitened_over_answers() -> None:
    """Less their group's mean they are 0.5, -0.5, 1 and -1: a variance of 0.625, and a deviation of 0.790569."""
    config = SimpleNamespace(samples_per_prompt=2, advantage="batch", kl="loss")
    statistics = Statistics(accelerate.Accelerator(cpu=True))
    trainer: Any = SimpleNamespace(config=config, kl_coef=0.1, statistics=statistics, signs=SIGNS)
    two = dataclasses.replace(
        rollouts([1.0, 0, 3, 1]),
        kept=ALL,
        **{name: getattr(rollouts([0.0]), name).repeat(2, 1) for name in ("answer_mask", "logps", "ref_logps")},
    )
    advantages = GRPOTrainer.estimate_advantages(trainer, two).advantages

    torch.testing.assert_close(advantages[:, 0], torch.tensor([0.632456, -0.632456, 1.264911, -1.264911]))


def test_refused_answers_do_not_count_and_one_alone_teaches_nothing() -> None:
    scores, kept = torch.tensor([2.0, 0, 99, 5]), torch.tensor([True, True, False, True])

    torch.testing.assert_close(
        relative_scores(scores, kept, 4, "leave-one-out"), torch.tensor([2 - 2.5, 0 - 3.5, 0, 5 - 1])
    )
    for advantage in ("group", "group-mean", "leave-one-out"):
        assert not relative_scores(scores, torch.tensor([True, False, False, False]), 4, advantage).any()


def test_groups_without_spread_are_those_of_equal_kept_scores() -> None:
    scores = torch.tensor([0.7, 0.7 + 1e-8, 99, 0.7, 0.1, 0.1, 0.1, 0.2, 1, 2, 3, 4, 1, 2, 3, 4])
    kept = torch.ones(16, dtype=torch.bool)
    kept[[2, 8, 9, 10, 12, 13, 14, 15]] = False  # the third group keeps one answer, the fourth none

    assert without_spread(scores, kept, 4).tolist() == [True, False, True, True]


def test_weights_of_tokens_by_hand() -> None:
    """Two answers, of three tokens and of one, which may have four: a step of them alone."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    of_step = torch.tensor(4), torch.tensor(2), 4
    rows = {
        "token": [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0]],
        "sequence": [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]],
        "constant": [[1 / 8, 1 / 8, 1 / 8], [1 / 8, 0, 0]],
    }

    for aggregate, expected in rows.items():
        torch.testing.assert_close(token_weights(mask, aggregate, *of_step), torch.tensor(expected))  # type: ignore[arg-type]


def rollouts(scores: list[float]) -> Rollouts:
    """Two answers to one prompt, of three tokens and of two, whose log-ratios sum to 4 and to 2."""
    return Rollouts(
        prompts=[[1], [1]],
        answers=[[2, 2, 2], [2, 2]],
        scores=torch.tensor(scores),
        kept=torch.tensor([True, True]),
        answer_mask=torch.tensor([[True, True, True], [True, True, False]]),
        logps=torch.tensor([[-1.0, -1, -1], [-1, -1, 0]]),
        ref_logps=torch.tensor([[-2.0, -1, -4], [-1, -3, 0]]),
        values=None,
        metrics={},
    )


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ("reward", [[1 - 0.4, 1 - 0.3, 1 - 0.3], [-1 - 0.2, -1 - 0.2, 0]]),  # from each token to the end
        ("score", [[2.6 - 1.7] * 3, [0.8 - 1.7, 0.8 - 1.7, 0]]),  # 3 - 0.1 * 4 and 1 - 0.1 * 2, whose mean is 1.7
        ("loss", [[1.0, 1, 1], [-1, -1, 0]]),
    ],
)
def test_where_the_kl_penalty_applies(kl: str, expected: list[list[float]]) -> None:
    config = SimpleNamespace(samples_per_prompt=2, advantage="group-mean", kl=kl)
    statistics = SimpleNamespace(mean=lambda values: float(values.mean()))
    trainer: Any = SimpleNamespace(config=config, kl_coef=0.1, statistics=statistics, signs=SIGNS)
    estimates = GRPOTrainer.estimate_advantages(trainer, rollouts([3.0, 1.0]))

    torch.testing.assert_close(estimates.advantages, torch.tensor(expected))
    assert estimates.metrics == {"equal_scores": 0}


def batch_of(ratio: list[float], advantages: list[float]) -> PolicyBatch:
    return PolicyBatch(
        logps=torch.tensor([ratio]).log().requires_grad_(),
        old_logps=torch.zeros(1, len(ratio)),
        advantages=torch.tensor([advantages]),
        entropy=torch.full((1, len(ratio)), 2.0),
        mask=torch.ones(1, len(ratio), dtype=torch.bool),
        num_tokens=len(ratio),
    )


def test_an_asymmetric_clip_range_by_hand() -> None:
    """1.25 is inside of the upper bound of 1.28, 1.5 is not; 0.5 is under the lower one of 0.8."""
    batch = batch_of([1.25, 1.5, 0.5, 0.9], [1.0, 1, -1, 2])
    output = losses.grpo_clip(losses.ClipConfig(cliprange_high=0.28, entropy_coef=0.01))(batch)
    output.loss.backward()

    assert output.loss.item() == pytest.approx((-1.25 - 1.28 + 0.8 - 1.8) / 4 - 0.01 * 2)
    assert output.metrics["clip_fraction"] == pytest.approx(2 / 4)
    torch.testing.assert_close(batch.logps.grad, torch.tensor([[-1.25 / 4, 0, 0, -1.8 / 4]]))


def test_reinforce_by_hand() -> None:
    batch = batch_of([1.0, 0.5], [3.0, -1.0])
    output = losses.reinforce(losses.ReinforceConfig())(batch)
    output.loss.backward()

    assert output.loss.item() == pytest.approx((0 + torch.tensor(0.5).log().item()) / 2)
    torch.testing.assert_close(batch.logps.grad, torch.tensor([[-3 / 2, 1 / 2]]))


@pytest.mark.parametrize(
    ("name", "of_value", "of_gradient"),
    [("k1", True, True), ("k2", False, True), ("k3", True, True), ("k3-plain", True, False)],
)
def test_what_the_estimators_of_the_kl_are_on_average(name: str, of_value: bool, of_gradient: bool) -> None:
    """Exact means over a vocabulary of three: their value is the KL, and their gradient that of the KL, or not."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.double, requires_grad=True)
    logps, ref_logps = logits.log_softmax(0), torch.tensor([0.2, 0.3, 0.5], dtype=torch.double).log()
    kl = (logps.exp() * (logps - ref_logps)).sum()
    (gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    old = logps.detach()
    mean = (old.exp() * kl_estimate(name, logps, old, ref_logps)).sum()
    (mean_gradient,) = torch.autograd.grad(mean, logits)

    assert torch.isclose(mean, kl) == of_value
    assert torch.allclose(mean_gradient, gradient) == of_gradient
    if name == "k3-plain":  # the KL in the other direction
        torch.testing.assert_close(mean_gradient, old.exp() - ref_logps.exp())


# --- beside TRL ------------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
OLD, REF = (-3 * torch.rand(4, 5, generator=GENERATOR) for _ in range(2))
LOGPS = OLD + 0.4 * torch.randn(4, 5, generator=GENERATOR)
ADVANTAGES = torch.tensor([1.0, -0.5, -1.5, 1.0])
LONGEST = 8


def trl_loss(trainer: Any, logps: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The loss of a TRL trainer for a policy that has these log-probabilities, with the settings of GRPOConfig."""
    names = ("loss_type", "beta", "epsilon_low", "epsilon_high", "use_bias_correction_kl")
    settings = dict(zip(names, ("grpo", 0.0, 0.2, 0.2, False), strict=True)) | inputs.pop("settings", {})
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    metrics: dict[str, Any] = {"train": trl.trainer.grpo_trainer.defaultdict(list)}
    fake = SimpleNamespace(
        **settings,
        args=SimpleNamespace(delta=None, steps_per_generation=1, **settings),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        _entropy_bonus_enabled=False,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
    )
    ids, mask = torch.ones(4, 5, dtype=torch.long), MASK.long()
    shared = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    shared["num_items_in_batch"] = MASK.sum()
    loss: torch.Tensor = trainer._compute_loss(fake, None, {**shared, "advantages": ADVANTAGES, **inputs})
    return loss


@pytest.mark.parametrize(("aggregate", "loss_type"), [("token", "dapo"), ("sequence", "grpo"), ("constant", "dr_grpo")])
@pytest.mark.parametrize(
    ("estimator", "beta", "high"), [("k3-plain", 0.0, 0.2), ("k3-plain", 0.3, 0.2), ("k3", 0.3, 0.28)]
)
def test_loss_and_gradients_are_those_of_trl(
    aggregate: Any, loss_type: str, estimator: str, beta: float, high: float
) -> None:
    """A step of two microbatches of two answers, as the trainer weights them, against one of four by TRL."""
    theirs, ours = LOGPS.clone().requires_grad_(), LOGPS.clone().requires_grad_()
    settings = {"loss_type": loss_type, "beta": beta, "epsilon_high": high, "use_bias_correction_kl": estimator == "k3"}
    expected = trl_loss(trl.GRPOTrainer, theirs, old_per_token_logps=OLD, ref_per_token_logps=REF, settings=settings)
    expected.backward()

    trainer: Any = object.__new__(GRPOTrainer)
    trainer.config = SimpleNamespace(kl="loss", kl_estimator=estimator, aggregate=aggregate, response_length=LONGEST)
    trainer.loss = losses.grpo_clip(losses.ClipConfig(cliprange_high=high))
    trainer.metrics, trainer.accelerator = {"kl_coef": beta}, SimpleNamespace(reduce=lambda x: x)
    trainer.state, trainer.args = SimpleNamespace(global_step=0), SimpleNamespace(max_steps=1)
    rows = [slice(0, 2), slice(2, 4)]
    loaded = iter({"mask": MASK[row], "advantages": ADVANTAGES[row, None].expand(2, 5)} for row in rows)
    batches, num_tokens = trainer.get_batch_samples(loaded, 2, "cpu")
    loss = torch.tensor(0.0)
    for row, inputs in zip(rows, batches, strict=True):
        batch = PolicyBatch(ours[row], OLD[row], inputs["advantages"], torch.zeros(2, 5), MASK[row], num_tokens)
        loss = loss + trainer.loss_of(batch, {**inputs, "ref_logps": REF[row]}).loss
    loss.backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_first_step_of_rloo_has_the_gradient_of_trl() -> None:
    """On the policy that sampled. TRL takes the mean over answers of sums over tokens; ours is divided by LONGEST."""
    theirs, ours = OLD.clone().requires_grad_(), OLD.clone().requires_grad_()
    trl_loss(trl.RLOOTrainer, theirs, old_logps=(OLD * MASK).sum(1)).backward()
    weights = token_weights(MASK, "constant", MASK.sum(), torch.tensor(4), LONGEST)
    advantages = ADVANTAGES[:, None] * weights * MASK.sum()
    batch = PolicyBatch(ours, OLD, advantages, torch.zeros(4, 5), MASK, MASK.sum())
    losses.reinforce(losses.ReinforceConfig())(batch).loss.backward()

    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad / LONGEST)
