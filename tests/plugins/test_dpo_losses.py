"""DPO's losses, by hand and beside TRL's, and the pairs that they are of."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit import PreferenceLogps
from alignkit.data.encoding import Branches, Ranked
from alignkit_dpo import alignkit_loss, losses
from alignkit_dpo.config import AotConfig, CpoConfig, OrpoConfig, SimpoConfig
from alignkit_dpo.pairs import Collator, pairs_of

LOSSES = {loss.name: loss for loss in alignkit_loss()}
ELSEWHERE = {"simpo", "orpo", "cpo"}  # TRL has them in trainers of their own


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- losses by hand --------------------------------------------------------------------------------------------------

# log-ratios 1 and -0.5, 2 and 5 tokens
PAIR = PreferenceLogps(*(torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)), torch.tensor([2]), torch.tensor([5]))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, softplus(-0.15)),
        ("sigmoid_norm", {"beta": 0.1}, softplus(-0.1 * (1 / 2 + 0.5 / 5))),
        ("ipo", {"beta": 0.1}, (0.5 + 0.1 - 5) ** 2),
        ("hinge", {"beta": 0.1}, 0.85),
        ("hinge", {"beta": 1.0}, 0),
        ("robust", {"beta": 0.1, "label_smoothing": 0.2}, (0.8 * softplus(-0.15) - 0.2 * softplus(0.15)) / 0.6),
        (
            "exo_pair",
            {"beta": 0.1, "label_smoothing": 0.2},
            sigma(0.15) * math.log(sigma(0.15) / 0.8) + sigma(-0.15) * math.log(sigma(-0.15) / 0.2),
        ),
        ("nca_pair", {"beta": 0.1}, softplus(-0.1) + 0.5 * softplus(0.1) + 0.5 * softplus(-0.05)),
        ("bco_pair", {"beta": 0.1}, softplus(-0.1) + softplus(-0.05)),
        ("sppo_hard", {"beta": 0.1}, (1 - 5) ** 2 + (-0.5 + 5) ** 2),
        ("aot", {"beta": 0.1, "label_smoothing": 0.2}, 0.8 * softplus(-0.15) + 0.2 * softplus(0.15)),
        ("aot_unpaired", {"beta": 0.1, "label_smoothing": 0.2}, 0.8 * softplus(-0.15) + 0.2 * softplus(0.15)),
        ("apo_zero", {"beta": 0.1}, 1 - sigma(0.1) + sigma(-0.05)),
        ("apo_down", {"beta": 0.1}, sigma(0.1) + 1 - sigma(0.15)),
        (
            "discopop",
            {"beta": 0.1, "discopop_tau": 0.5},
            (1 - sigma(0.3)) * softplus(-0.15) + sigma(0.3) * math.exp(-0.15),
        ),
        ("sft", {}, 0.5),
        ("simpo", {"beta": 2.0, "gamma": 1.0}, softplus(-(2 * (-0.5 + 0.6) - 1))),
        ("orpo", {"beta": 0.3}, 0.5 + 0.3 * softplus(log_odds(-0.6) - log_odds(-0.5))),
        ("cpo", {"beta": 0.3, "cpo_alpha": 0.2}, softplus(-0.3 * (-1 + 3)) + 0.2 * 0.5),
    ],
)
def test_losses_by_hand(name: str, settings: dict[str, float], expected: float) -> None:
    component = LOSSES[name]
    loss = component.build(component.config(**settings))(PAIR).loss

    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_aot_compares_quantiles_of_the_batch() -> None:
    """Policy margins 3, 1 and reference margins 0, 2: sorted, 1 - 0 and 3 - 2. Unpaired: log-ratios 2, 0 and -1, 1."""
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor([[1.0, 0.0], [-2.0, -1.0], [-1.0, 0.0], [-1.0, -2.0]])
    batch = PreferenceLogps(chosen, rejected, ref_chosen, ref_rejected, torch.tensor([1, 1]), torch.tensor([1, 1]))

    assert losses.aot(batch, AotConfig(1.0)).tolist() == pytest.approx([softplus(-1)] * 2)
    assert losses.aot_unpaired(batch, AotConfig(1.0)).tolist() == pytest.approx([softplus(-1)] * 2)


# --- beside TRL's own method -----------------------------------------------------------------------------------------


def trls(name: str, settings: dict[str, float], batch: PreferenceLogps) -> torch.Tensor:
    """TRL's loss of a batch: its ``_compute_loss``, on a model that gives the log-probabilities of the batch."""
    import trl

    sums, lengths = torch.cat([batch.chosen, batch.rejected]), torch.cat([batch.chosen_length, batch.rejected_length])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    # the method adds up an answer's tokens: the first has the whole sum
    logps = torch.nn.functional.pad(sums[:, None], (0, mask.shape[1] - 1))
    tokens = torch.nn.functional.pad(mask, (1, 0)).long()  # the first token is the prompt's
    zeros = torch.zeros_like(logps)
    no_reference = torch.zeros_like(batch.chosen)
    inputs = {
        **dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), tokens),
        "ref_chosen_logps": no_reference if batch.ref_chosen is None else batch.ref_chosen,
        "ref_rejected_logps": no_reference if batch.ref_rejected is None else batch.ref_rejected,
    }
    output = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=mask)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=False,
        args=SimpleNamespace(**settings),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    loss: torch.Tensor = trl.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    return loss


@pytest.mark.parametrize("name", sorted({loss.name for loss in alignkit_loss()} - ELSEWHERE))
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.05, 0.4])
def test_loss_and_gradient_are_trls(name: str, beta: float, label_smoothing: float) -> None:
    component = LOSSES[name]
    known = {field.name for field in dataclasses.fields(component.config)}
    settings = {"beta": beta, "label_smoothing": label_smoothing, "discopop_tau": 0.3}
    settings = {field: value for field, value in settings.items() if field in known}
    torch.manual_seed(0)
    policy = (-20 * torch.rand(2, 16, dtype=torch.double)).requires_grad_()
    reference = policy.detach() + torch.randn(2, 16, dtype=torch.double)
    lengths = torch.randint(1, 9, (2, 16))
    given = reference if component.needs_reference else (None, None)
    batch = PreferenceLogps(*policy, *given, *lengths)

    ours, theirs = component.build(component.config(**settings))(batch).loss, trls(name, settings, batch)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy))


@pytest.fixture
def of_trainers(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Log-probabilities of 32 pairs, and what TRL's trainers for losses without a reference read."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.manual_seed(0)
    logps = (-10 * torch.rand(2, 32, dtype=torch.double)).requires_grad_()
    lengths = torch.randint(1, 9, (2, 32))
    trainer = SimpleNamespace(alpha=0.0, simpo_gamma=0.7, beta=1.5, label_smoothing=0.0)
    trainer.accelerator = SimpleNamespace(device="cpu")
    batch = PreferenceLogps(*logps, None, None, *lengths)
    return SimpleNamespace(trainer=trainer, logps=logps, per_token=logps / lengths, batch=batch)


def same(ours: torch.Tensor, theirs: torch.Tensor, logps: torch.Tensor) -> None:
    """Equal in value and gradient."""
    torch.testing.assert_close(ours, theirs, check_dtype=False)
    gradients = [torch.autograd.grad(loss.sum(), logps, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_simpo_is_trls(of_trainers: SimpleNamespace) -> None:
    from trl.experimental.cpo import CPOTrainer

    of_trainers.trainer.loss_type = "simpo"
    theirs, _, _ = CPOTrainer.cpo_loss(of_trainers.trainer, *of_trainers.per_token)

    same(losses.simpo(of_trainers.batch, SimpoConfig(1.5, 0.7)), theirs, of_trainers.logps)


def test_cpo_is_trls(of_trainers: SimpleNamespace) -> None:
    from trl.experimental.cpo import CPOTrainer

    of_trainers.trainer.loss_type = "sigmoid"
    theirs, _, _ = CPOTrainer.cpo_loss(of_trainers.trainer, *of_trainers.logps)

    expected = theirs - 0.4 * of_trainers.per_token[0]  # TRL adds the likelihood elsewhere
    same(losses.cpo(of_trainers.batch, CpoConfig(1.5, 0.4)), expected, of_trainers.logps)


def test_orpo_is_trls(of_trainers: SimpleNamespace) -> None:
    from trl.experimental.orpo import ORPOTrainer

    theirs, *_ = ORPOTrainer.odds_ratio_loss(of_trainers.trainer, *of_trainers.per_token)

    expected = -of_trainers.per_token[0] - theirs  # TRL's likelihood is of the prompt too; the paper's is not
    same(losses.orpo(of_trainers.batch, OrpoConfig(1.5)), expected, of_trainers.logps)


def test_orpo_is_finite_where_the_policy_is_certain() -> None:
    logps = torch.tensor([0.0, -1e-9, -100.0], requires_grad=True)
    loss = losses.orpo(PreferenceLogps(logps, logps.flip(0), None, None, *torch.ones(2, 3)), OrpoConfig())

    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), logps)[0].isfinite().all()


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_ranking_is_all_its_pairs_but_ties() -> None:
    ranked = Ranked([], Branches([1, 2], [[3], [4, 5], [6]]), [1.0, 0.0, 1.0])

    assert [(p["chosen_ids"], p["rejected_ids"], p["prompt_index"]) for p in pairs_of([ranked])] == [
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
    named = {loss.name: loss for loss in alignkit_loss() if loss.name not in ELSEWHERE}

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
