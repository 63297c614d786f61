"""The reference of DPO: which model it is, what it costs, and that it is not trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import logged, record, weights

from alignkit.models import uses_fused_head

LN_2 = pytest.approx(math.log(2), abs=1e-6)


def loss_of(trainer: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    loss: torch.Tensor = trainer.compute_loss(
        trainer.model.train(), trainer.data_collator(pairs), num_items_in_batch=len(pairs)
    )
    return loss


@pytest.mark.parametrize(
    ("below", "above", "kind"),
    [
        ("full", "full", "model"),
        ("lora", "lora", "adapter"),
        ("qlora", "qlora", "adapter"),
        ("full", "lora", "base"),
        ("lora", "full", "model"),
    ],
)
def test_the_reference_is_the_sft_run_whatever_it_is_made_of(
    train_dpo: Callable[..., Path], train: Callable[..., Path], below: str, above: str, kind: str
) -> None:
    sft = train("--plugin", below, "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    settings = ["--plugin", above, f"dpo.policy={sft}", "train.max_steps=3", "train.learning_rate=0.001"]
    dpo = train_dpo(*settings, "train.logging_steps=1", "train.gradient_checkpointing=true")
    metrics = record(dpo)["metrics"]

    assert metrics["first_eval_loss"] == LN_2
    assert metrics["first_eval_kl"] == 0
    assert logged(dpo, "loss")[0] == LN_2
    assert logged(dpo, "loss")[1] != LN_2
    assert metrics["eval_loss"] != LN_2
    assert metrics["eval_kl"] != 0
    assert record(dpo)["parents"]["policy"]["folder"] == str(sft)
    assert not (dpo / "ref").exists()


def test_the_reference_takes_the_path_of_the_policy_under_autocast(dpo_trainer: Callable[..., Any]) -> None:
    """accelerate wraps the frozen copy's forward in autocast: its fused head, measured in bf16, seemed to be wrong."""
    trainer = dpo_trainer("--plugin", "full", "train.bf16=true")

    assert uses_fused_head(trainer.model)
    assert uses_fused_head(trainer.ref_model)


def test_adapters_of_embeddings_are_in_the_reference(
    dpo_trainer: Callable[..., Any], train: Callable[..., Path]
) -> None:
    """TRL's own copy leaves them out, and starts elsewhere than at ln 2."""
    modules = "tuner.target_modules=[q_proj,embed_tokens]"
    sft = train("--plugin", "lora", modules, "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    trainer = dpo_trainer("--plugin", "lora", f"dpo.policy={sft}", modules, "train.bf16=false")
    pairs = list(trainer.train_dataset)[:4]

    assert loss_of(trainer, pairs).item() == LN_2


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("loss", ["simpo", "sft", "orpo", "cpo"])
def test_where_the_loss_needs_no_reference_none_is_in_memory(
    dpo_trainer: Callable[..., Any], train: Callable[..., Path], tuner: str, loss: str
) -> None:
    sft = train("--plugin", tuner, "train.max_steps=1", output="sft")
    settings = ["--plugin", tuner, f"dpo.policy={sft}"]
    without = dpo_trainer(*settings, f"loss.name={loss}", output="without")
    with_reference = dpo_trainer(*settings, output="with")

    def in_memory(trainer: Any) -> int:
        models = [trainer.model, *([trainer.ref_model] if trainer.ref_model else [])]
        return sum(p.numel() for model in models for p in model.parameters())

    trained = sum(p.numel() for p in without.model.parameters() if p.requires_grad)
    assert in_memory(with_reference) - in_memory(without) == trained
    assert without.ref_model is None
    assert math.isfinite(loss_of(without, list(without.train_dataset)[:2]).item())


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_a_precomputed_reference_gives_the_same_run(
    train_dpo: Callable[..., Path], train: Callable[..., Path], sgd: None, tuner: str
) -> None:
    sft = train("--plugin", tuner, "train.max_steps=1", output="sft")
    settings = ["--plugin", tuner, "--plugin", "sgd", f"dpo.policy={sft}", "train.max_steps=3", "train.bf16=false"]
    live = train_dpo(*settings, "train.learning_rate=0.1", output="live")
    before = train_dpo(*settings, "train.learning_rate=0.1", "dpo.precompute_ref_log_probs=true", output="before")

    assert record(before)["metrics"]["first_eval_loss"] == LN_2
    assert record(before)["metrics"]["eval_loss"] == pytest.approx(record(live)["metrics"]["eval_loss"], abs=1e-6)
    for name, tensor in weights(live).items():
        torch.testing.assert_close(weights(before)[name], tensor)
