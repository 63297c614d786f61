"""What ``train.deepspeed`` accepts, and where sharding by DeepSpeed or accelerate is refused, all without DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit import ConfigError
from alignkit.config import resolve
from alignkit.config.deepspeed import check_launch, read
from alignkit.registry import Registry

ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks see a package ``deepspeed``."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json" if name == "deepspeed" else name))


def train_table(stage: str, *plugins: str, **train: Any) -> dict[str, Any]:
    return dict(resolve(Registry(), {"plugins": [stage, *plugins], "train": train}, {}).train)


@pytest.mark.usefixtures("installed")
def test_a_config_file_becomes_the_recorded_table(tmp_path: Path) -> None:
    """So that ``--resume`` notices a change of the file."""
    file = tmp_path / "ds.json"
    content = {**ZERO3, "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    file.write_text(json.dumps(content))

    assert train_table("sft", deepspeed=str(file))["deepspeed"] == {
        **ZERO3,
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage must be 2 or 3"),
        ({}, "zero_optimization.stage must be 2 or 3"),
        ({**ZERO3, "optimizer": {"type": "AdamW"}}, "train.deepspeed.optimizer is not supported: set optimizer.name"),
        ({**ZERO3, "scheduler": {}}, "train.deepspeed.scheduler is not supported: set train.lr_scheduler_type"),
        ({**ZERO3, "bf16": {"enabled": True}}, "train.deepspeed.bf16 is not supported: set train.bf16"),
        ({**ZERO3, "curriculum_learning": {}}, "train.deepspeed.curriculum_learning is not supported. Sections: zero"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            "would be saved without its weights",
        ),
        ("no/such.json", "train.deepspeed: no config file no/such.json"),
        ([3], "train.deepspeed: .* is not a table"),
    ],
)
def test_settings_that_would_change_the_training_are_refused(table: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(table)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"fp16": True}, "train.fp16 does not work with train.deepspeed"),
        ({"torch_compile": True}, "train.torch_compile does not work with train.deepspeed"),
    ],
)
def test_settings_that_do_not_go_together(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_table("sft", deepspeed=ZERO3, **train)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rahf", "kto"])
def test_other_stages_refuse_deepspeed_even_in_a_shared_table(stage: str) -> None:
    """Left out, as other keys that a stage does not have, it would train with whole models in each process."""
    with pytest.raises(ConfigError, match=f"train.deepspeed has no effect in stage '{stage}': remove it here"):
        train_table(stage, deepspeed=ZERO3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_missing_package_is_an_error_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="train.deepspeed: DeepSpeed is not installed: pip install deepspeed"):
        train_table("sft", deepspeed=ZERO3)


@pytest.mark.parametrize("key", ["fsdp", "fsdp_config", "parallelism_config"])
def test_the_trainers_own_fsdp_names_what_to_set(key: str) -> None:
    """On a CPU, the Trainer would run DDP and report nothing."""
    with pytest.raises(ConfigError, match=rf"train.{key} is not supported: set train.shard=fsdp2"):
        train_table("sft", **{key: "full_shard"})


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_FSDP", "error: accelerate launch is configured for FSDP, .* Set train.shard=fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "error: accelerate is configured for DeepSpeed .* Set train.deepspeed"),
    ],
)
def test_accelerates_own_sharding_is_refused_before_training(
    variable: str,
    message: str,
    run_stage: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(AssertionError, match=message):
        run_stage("sft", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_command_does_not_train_part_of_its_stages_with_deepspeed() -> None:
    """In one process, accelerate would train the other stages with it too."""
    with pytest.raises(ConfigError, match="a command trains all its stages with train.deepspeed or none"):
        check_launch([{"deepspeed": ZERO3}, {}])
    check_launch([{"deepspeed": ZERO3}, {"deepspeed": ZERO3}])


def run_of(**train: Any) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(train=train, stage=SimpleNamespace(component=SimpleNamespace(name="sft"))), processes=1
    )


def test_one_process_is_refused() -> None:
    from alignkit.training.deepspeed import arguments

    with pytest.raises(ConfigError, match="train.deepspeed needs several processes: alignkit launch --processes"):
        arguments(run_of(deepspeed=ZERO3))


def test_optimizers_that_use_the_shape_of_a_weight_are_refused() -> None:
    """ZeRO gives them flat parts of all weights: they would train differently, and nothing would report it."""
    import torch
    from transformers.optimization import Adafactor

    from alignkit.training.deepspeed import check_optimizer

    check_optimizer(torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, "optimizer 'adamw'")
    with pytest.raises(ConfigError, match="optimizer 'adafactor' does not work with train.deepspeed"):
        check_optimizer(
            Adafactor, {"lr": 1e-2, "scale_parameter": False, "relative_step": False}, "optimizer 'adafactor'"
        )


def test_quantized_weights_are_refused_with_zero_3_only() -> None:
    import torch

    from alignkit.training.deepspeed import prepare

    trainer: Any = SimpleNamespace(model=SimpleNamespace(is_quantized=True))
    with pytest.raises(ConfigError, match="ZeRO-3 does not work with a quantized base"):
        prepare(trainer, run_of(deepspeed=ZERO3))
    run = run_of(deepspeed={"zero_optimization": {"stage": 2}})
    run.dtype = torch.float32
    prepare(trainer, run)
