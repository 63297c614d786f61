"""DPO's losses, by hand and beside TRL's, and the pairs that they are of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit import PreferenceLogps
from alignkit.data.encoding import Branches, Ranked
from alignkit_dpo import alignkit_loss, losses
from alignkit_dpo.config import BetaConfig, RobustConfig, SimpoConfig
from alignkit_dpo.pairs import Collator, pairs_of


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- losses by hand --------------------------------------------------------------------------------------------------

# log-ratios 1 and -0.5, 2 and 5 tokens
PAIR = PreferenceLogps(*(torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)), torch.tensor([2]), torch.tensor([5]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.sigmoid(BetaConfig(0.1)), softplus(-0.15)),
        (losses.ipo(BetaConfig(0.1)), (0.5 + 0.1 - 5) ** 2),
        (losses.hinge(BetaConfig(0.1)), 0.85),
        (losses.hinge(BetaConfig(1.0)), 0),
        (losses.robust(RobustConfig(0.1, 0.2)), (0.8 * softplus(-0.15) - 0.2 * softplus(0.15)) / 0.6),
        (losses.simpo(SimpoConfig(2.0, 1.0)), softplus(-(2 * (-0.5 + 0.6) - 1))),
    ],
)
def test_losses_by_hand(loss: losses.Function, expected: float) -> None:
    assert loss(PAIR).loss.item() == pytest.approx(expected, abs=1e-6)


def test_simpo_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    torch.manual_seed(0)
    chosen, rejected = -10 * torch.rand(2, 32)
    lengths = torch.randint(1, 9, (2, 32))
    trainer = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=1.5, label_smoothing=0.0)
    trainer.accelerator = SimpleNamespace(device="cpu")
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen / lengths[0], rejected / lengths[1])
    ours = losses.simpo(SimpoConfig(1.5, 0.7))(PreferenceLogps(chosen, rejected, None, None, *lengths)).loss

    assert abs(ours - theirs.mean()) < 1e-6


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_ranking_is_all_its_pairs_but_ties() -> None:
    ranked = Ranked([], Branches([1, 2], [[3], [4, 5], [6]]), [1.0, 0.0, 1.0])

    assert [(p["chosen_ids"], p["rejected_ids"], p["number"]) for p in pairs_of([ranked])] == [
        ([4, 5], [3], 0),
        ([4, 5], [6], 0),
    ]


def test_a_batch_holds_each_answer_once() -> None:
    pairs = pairs_of([Ranked([], Branches([1, 2], [[3], [4, 5], [6]]), [0.0, 1.0, 2.0])])
    batch = Collator(pad=9)(pairs)

    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 2, 4, 5], [1, 2, 6, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100], [-100, -100, 4, 5], [-100, -100, 6, -100]]
    assert batch["pairs"].tolist() == [[0, 1], [0, 2], [1, 2]]
    assert batch["lengths"].tolist() == [1, 2, 1]
    tree = Collator(pad=9, tree=torch.float32)(pairs)
    assert tree["input_ids"].tolist() == [[1, 2, 3, 2, 4, 5, 2, 6]]  # each branch begins with the prompt's last token
    assert tree["position_ids"].tolist() == [[0, 1, 2, 1, 2, 3, 1, 2]]


# --- beside TRL ------------------------------------------------------------------------------------------------------


def moved(trainer: Any) -> Any:
    """The trainer, its policy no longer its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def trls_loss(trainer: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    """What TRL's own method gives, with its own collator, forward and reference."""
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    inputs = trainer._prepare_inputs(DataCollatorForPreference(trainer.data_collator.pad)(pairs))
    loss: torch.Tensor = trl.DPOTrainer._compute_loss(trainer, trainer.model.train(), inputs, False)
    return loss


def our_loss(trainer: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    loss: torch.Tensor = trainer.compute_loss(
        trainer.model.train(), trainer.data_collator(pairs), num_items_in_batch=len(pairs)
    )
    return loss


@pytest.mark.parametrize(("tuner", "shared"), [("lora", "true"), ("full", "false")])
def test_every_loss_is_trls_on_the_same_batch(dpo_trainer: Callable[..., Any], tuner: str, shared: str) -> None:
    trainer = moved(dpo_trainer("--plugin", tuner, "train.bf16=false", f"dpo.shared_prompt={shared}"))
    pairs = list(trainer.train_dataset)[:7]
    named = {loss.name: loss for loss in alignkit_loss() if loss.name != "simpo"}

    assert len(named) == 15
    assert trainer.data_collator.tree is (torch.float32 if shared == "true" else None)
    for name, component in named.items():
        config = component.config()
        settings = dataclasses.asdict(config)
        trainer.loss, trainer.loss_types = component.build(config), [name]
        trainer.beta = settings.get("beta", 0.1)
        trainer.label_smoothing = settings.get("label_smoothing", 0.0)
        trainer.args.discopop_tau = settings.get("discopop_tau", 0.05)
        ours, theirs = our_loss(trainer, pairs), trls_loss(trainer, pairs)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5), name
        assert ours.item() != pytest.approx(math.log(2), abs=1e-4), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
def test_gradients_are_trls_with_a_shared_prompt_and_without(
    dpo_trainer: Callable[..., Any], architecture: str
) -> None:
    for shared in ("true", "false"):
        settings = ["--plugin", "lora", "train.bf16=false", f"dpo.shared_prompt={shared}"]
        trainer = moved(dpo_trainer(*settings, model=architecture, output=shared))
        pairs = list(trainer.train_dataset)[:4]
        found = []
        for loss in (our_loss, trls_loss):
            trainer.model.zero_grad()
            loss(trainer, pairs).backward()
            found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)
