"""KTO's loss, by hand and beside TRL's, and the answers from which it estimates the KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from alignkit import Ranking, Rated, RatedLogps
from alignkit_kto.answers import answer_logps, other_answers
from alignkit_kto.config import KTOLossConfig
from alignkit_kto.losses import kto
from alignkit_kto.ratings import ratings


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("good_weight", "bad_weight"), [(1, 1), (1, 3), (2, 0.5)])
def test_the_loss_by_hand(good_weight: float, bad_weight: float) -> None:
    """Log-ratios 2 and -1 of good answers and 2 of a bad one, and a KL of 0.5."""
    batch = RatedLogps(
        logps=torch.tensor([-3.0, -8.0, -3.0]),
        ref_logps=torch.tensor([-5.0, -7.0, -5.0]),
        good=torch.tensor([True, True, False]),
        length=torch.tensor([2, 2, 2]),
        kl=torch.tensor(0.5),
    )
    good = (1 - sigma(0.1 * 1.5)) + (1 - sigma(0.1 * -1.5))
    bad = 1 - sigma(0.1 * -1.5)

    loss = kto(KTOLossConfig(beta=0.1, good_weight=good_weight, bad_weight=bad_weight))(batch).loss
    assert loss.item() == pytest.approx((good_weight * good + bad_weight * bad) / 3, abs=1e-6)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_loss_and_gradient_are_those_of_trls_trainer(kto_trainer: Callable[..., Any], tuner: str) -> None:
    """TRL's own method on the same model, reference and answers, away from the reference."""
    weights = ["loss.good_weight=1.5", "loss.bad_weight=0.7", "loss.beta=0.3"]
    trainer = kto_trainer("--plugin", tuner, "train.bf16=false", "train.per_device_train_batch_size=6", *weights)
    rows = [trainer.train_dataset[n] for n in range(6)]
    trainer.desirable_weight, trainer.undesirable_weight, trainer.beta = 1.5, 0.7, 0.3
    model = trainer.model.train()
    torch.manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    likelihood = answer_logps(model, trainer.data_collator(rows), "other_")[0].sum()
    for parameter, gradient in zip(trained, torch.autograd.grad(likelihood, trained), strict=True):
        parameter.data.add_(0.02 * torch.randn_like(parameter) + 0.01 * gradient.sign())  # for a KL above 0
    names = {"answer_ids": "completion_ids", "other_ids": "KL_completion_ids", "good": "label"}
    collated = DataCollatorForUnpairedPreference(trainer.processing_class.pad_token_id)(
        [{names.get(name, name): value for name, value in row.items()} for row in rows]
    )

    ours = trainer.compute_loss(model, trainer.data_collator(rows), num_items_in_batch=len(rows))
    theirs = trl.KTOTrainer._compute_loss(trainer, model, collated, False)
    assert trainer._metrics["train"]["kl"][0] > 0.1
    assert trainer.means.take()["reference_point"] == pytest.approx(trainer._metrics["train"]["kl"][0], rel=1e-4)
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-6)


def test_a_kl_below_0_counts_as_0(kto_trainer: Callable[..., Any]) -> None:
    """The estimate from a few answers is negative if the policy finds them less likely than the reference does."""
    trainer = kto_trainer("--plugin", "full", "train.bf16=false", "train.per_device_train_batch_size=6")
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(6)])
    before = answer_logps(model, batch, "other_")[0]
    before.sum().backward()
    for parameter in model.parameters():
        parameter.data.sub_(0.01 * parameter.grad.sign())

    trainer.compute_loss(model, batch, num_items_in_batch=6)
    assert answer_logps(model, batch, "other_")[0].sum() < before.sum() - 1
    assert trainer.means.take()["reference_point"] == 0


@pytest.mark.parametrize("size", [1, 4])
def test_an_evaluation_is_that_of_one_batch_of_all_held_out_answers(kto_trainer: Callable[..., Any], size: int) -> None:
    """Its batch size changes neither the other answers nor the reference point."""
    settings = ["--plugin", "full", "train.bf16=false", "data.eval_size=6"]
    trainer = kto_trainer(*settings, f"train.per_device_eval_batch_size={size}")
    rows, model = list(trainer.eval_dataset), trainer.model
    batch = trainer.data_collator(rows)
    answer_logps(model, batch, "other_")[0].sum().backward()
    for parameter in model.parameters():
        parameter.data.add_(0.001 * parameter.grad.sign())
    evaluated = trainer.evaluate()

    loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=len(rows))
    means = trainer.training_metrics(trainer.means.take())
    assert len(rows) > 4
    others = other_answers([bytes(row["prompt_index"]) for row in rows], len(rows))
    for row, other in zip(rows, others, strict=True):
        assert row["other_ids"] == rows[other]["answer_ids"][: len(row["other_ids"])]
    assert means["reference_point"] > 0.1
    assert 0 < means["accuracy"] < 1
    assert evaluated["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name in ("accuracy", "margin", "rewards_good", "rewards_bad", "logps_good", "logps_bad", "reference_point"):
        assert evaluated[f"eval_{name}"] == pytest.approx(means[name], rel=1e-4), name


# --- answers to other prompts ----------------------------------------------------------------------------------------


def others(prompts: str, batch_size: int) -> list[int]:
    return other_answers([prompt.encode() for prompt in prompts], batch_size)


def test_the_answers_of_a_batch_are_rotated_by_one() -> None:
    assert others("abcdef", 3) == [2, 0, 1, 5, 3, 4]


def test_an_answer_to_the_same_prompt_is_passed_over() -> None:
    """Rankings give several answers to a prompt, whose own answers say nothing about the KL."""
    assert others("aabc", 4) == [3, 3, 1, 2]
    assert others("aab", 2) == [2, 2, 1]


def test_a_last_batch_of_one_takes_an_answer_of_the_batch_before() -> None:
    assert others("abcde", 2)[4] == 3


def test_no_answer_to_another_prompt_makes_the_longest_sequence(kto_trainer: Callable[..., Any]) -> None:
    """A model with learned positions could not read it."""
    lengths = [(30, 1), (1, 30), (20, 2), (2, 20)]
    rows = [
        {"prompt": "p " * lengths[n % 4][0] + str(n), "completion": "a " * lengths[n % 4][1], "label": n % 3 == 0}
        for n in range(16)
    ]
    trainer = kto_trainer("--plugin", "lora", "data.eval_size=0", rows=rows)
    rows = list(trainer.train_dataset)
    longest = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows)

    assert max(len(row["prompt_ids"]) + len(row["other_ids"]) for row in rows) == longest
    assert min(len(row["other_ids"]) for row in rows) > 0


def test_equal_answers_of_a_ranking_with_different_ratings_are_left_out(
    kto_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {n}", "responses": ["a", "b"], "ranks": [0, 1]} for n in range(3)]
    rows.append({"prompt": "Again", "responses": ["a", "b", "b", "c"], "ranks": [0, 1, 2, 3]})
    trainer = kto_trainer("--plugin", "lora", "data.eval_size=0", rows=rows)

    assert len(trainer.train_dataset) == 8
    assert "2 of 10 answers are left out: a better and a worse answer" in capsys.readouterr().out


# --- ratings of rankings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "good", "bad"),
    [
        ([0, 1], "a", "b"),
        ([3, 1, 2, 0], "bd", "ac"),
        ([0, 1, 2], "a", "c"),
        ([0, 1, 1], "a", "bc"),
        ([0, 0, 0, 9], "abc", "d"),
        ([0, 1, 50], "a", "c"),  # the middle is left out however far away the worst is
        ([1, 1], "", ""),
    ],
)
def test_the_better_half_is_good_and_the_worse_half_bad(ranks: list[float], good: str, bad: str) -> None:
    answers = "abcd"[: len(ranks)]
    rated = ratings(Ranking([{"role": "user", "content": "Hi"}], list(answers), ranks))

    assert "".join(answers[index] for index, is_good in rated if is_good) == good
    assert "".join(answers[index] for index, is_good in rated if not is_good) == bad


def test_a_rated_answer_is_what_it_is_rated() -> None:
    assert ratings(Rated([{"role": "user", "content": "Hi"}], "a", False)) == [(0, False)]
