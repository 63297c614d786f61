"""Every field of ``TrainingArguments`` in every stage: it acts, is refused with what to do instead, or is harmless.

A new release of Transformers with a field that is not in this table fails the first test: decide which it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit import ConfigError
from alignkit.config import resolve, training_args
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.registry import Registry

STAGES = ("sft", "rm", "dpo", "ppo")

ACTS_EVERYWHERE = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "max_steps", "learning_rate", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing", "gradient_checkpointing", "seed", "use_cpu"),
    *("full_determinism", "torch_compile", "torch_compile_backend", "torch_compile_mode", "save_strategy"),
    *("save_total_limit", "eval_delay", "report_to", "run_name", "restore_callback_states_from_checkpoint"),
    *("debug", "skip_memory_metrics", "torch_empty_cache_steps"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout"),
}
ACTS_BUT_IN_PPO = {
    *("num_train_epochs", "gradient_accumulation_steps", "logging_strategy", "logging_steps", "logging_first_step"),
    *("eval_strategy", "eval_steps", "eval_on_start", "save_steps", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "eval_accumulation_steps", "data_seed"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "train_sampling_strategy"),
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "deepspeed"),
}
ACTS_IN_SFT = {"neftune_noise_alpha"}
HARMLESS = {
    "logging_nan_inf_filter": "a loss that is not a number stops the run",
    "log_level": "which messages libraries print",
    "log_level_replica": "which messages libraries print",
    "log_on_each_node": "which machine of several prints",
    "save_on_each_node": "which machine of several writes",
    "project": "read by the tracker trackio alone",
    "trackio_space_id": "read by the tracker trackio alone",
    "trackio_bucket_id": "read by the tracker trackio alone",
    "trackio_static_space_id": "read by the tracker trackio alone",
}
VALUES: dict[str, Any] = {  # one that does not ask for nothing, where the type does not tell
    **{"train_sampling_strategy": "group_by_length", "dataloader_multiprocessing_context": "fork"},
    **{"logging_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
    **{"activation_checkpointing_kwargs": {"every_n_layers": 2}, "gradient_checkpointing_kwargs": {"offload": True}},
    **{"dataloader_prefetch_factor": 2, "hub_strategy": "end", "eval_do_concat_batches": False},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    **{"average_tokens_across_devices": False, "dataloader_in_order": False, "length_column_name": "n"},
}


def refused(stage: str) -> set[str]:
    """The keys that a stage refuses, whatever their value."""
    return {key for key in Registry().stage(stage).refuses if "=" not in key}


def acts(stage: str) -> set[str]:
    return ACTS_EVERYWHERE | (ACTS_BUT_IN_PPO if stage != "ppo" else set()) | (ACTS_IN_SFT if stage == "sft" else set())


def train_table(stage: str, *overrides: str) -> dict[str, Any]:
    """The resolved ``train`` table of a stage."""
    return resolve(Registry(), {}, merge({"plugins": [stage]}, *map(parse_override, overrides))).train


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_acts_is_refused_or_is_harmless(stage: str) -> None:
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    groups = [acts(stage), refused(stage), set(training_args.REFUSED) & fields, set(HARMLESS)]

    assert set().union(*groups) == fields
    assert sum(map(len, groups)) == len(fields)  # each is in one group


def value_of(name: str) -> Any:
    if name in VALUES:
        return VALUES[name]
    field = training_args.every_field()[name]
    if field.default is None or field.default is False:
        return 1 if any(number in str(field.type) for number in ("int", "float")) else True
    return field.default or 1


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_refused_is_refused_with_what_to_do_instead(stage: str) -> None:
    everywhere = {name for name in training_args.REFUSED if name in training_args.every_field()}
    for name in everywhere:
        with pytest.raises(ConfigError, match=f"train.{name} is not supported: .+"):
            train_table(stage, f"{stage}.train.{name}={VALUES.get(name, 'anything')}")
    for name in refused(stage):
        with pytest.raises(ConfigError, match=f"train.{name} has no effect in stage '{stage}': .+"):
            resolve(Registry(), {"plugins": [stage], "stages": {stage: {"train": {name: value_of(name)}}}}, {})


@pytest.mark.parametrize("stage", STAGES)
def test_what_asks_for_nothing_may_be_said(stage: str) -> None:
    nothing = {"push_to_hub": False, "load_best_model_at_end": False, "fsdp": None, "use_cache": False}
    assert not train_table(stage, *(f"{stage}.train.{k}={json.dumps(v)}" for k, v in nothing.items())).get("fsdp")


def test_a_shared_key_is_left_out_where_another_stage_uses_it() -> None:
    shared = resolve(Registry(), {"plugins": ["ppo"], "train": {"logging_steps": 3, "learning_rate": 1e-4}}, {})
    assert shared.unused == {"logging_steps": "there is one log line per iteration"}
    assert "logging_steps" not in shared.train
    assert shared.train["learning_rate"] == 1e-4
    assert resolve(Registry(), {"train": {"logging_steps": 3}}, {"plugins": ["ppo"]}, "sft").train["logging_steps"] == 3
    noise = resolve(Registry(), {"train": {"neftune_noise_alpha": 5}}, {"plugins": ["dpo"]})
    assert list(noise.unused) == ["neftune_noise_alpha"]


def test_what_an_optimizer_does_not_have_is_left_out() -> None:
    adafactor = resolve(Registry(), {"plugins": ["sft", "adafactor"], "train": {"adam_beta2": 0.95}}, {})
    assert adafactor.unused == {"adam_beta2": "Adafactor has no such setting"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["per_device_train_batch_size=0"], "per_device_train_batch_size: Input should be greater than or equal to 1"),
        (["gradient_accumulation_steps=0"], "gradient_accumulation_steps: Input should be greater than or equal to 1"),
        (["per_device_eval_batch_size=-1"], "per_device_eval_batch_size: Input should be greater than or equal to 1"),
        (["learning_rate=-1e-5"], "learning_rate: Input should be greater than or equal to 0"),
        (["learning_rate=.nan"], "learning_rate: "),
        (["num_train_epochs=.inf"], "num_train_epochs must be a finite number"),
        (["num_train_epochs=0"], "num_train_epochs: Input should be greater than 0"),
        (["eval_steps=0"], "eval_steps: Input should be greater than 0"),
        (["save_steps=2.5"], "save_steps must be a whole number of steps, or a fraction below 1"),
        (["max_steps=0"], "max_steps must be 1 or more, or -1 for no limit"),
        (["adam_beta2=1"], "adam_beta2: Input should be less than 1"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0"),
        (["lr_scheduler_type=cosin"], "lr_scheduler_type: Input should be 'linear', 'cosine'"),
        (["eval_strategy=stpes"], "eval_strategy: Input should be 'no', 'steps' or 'epoch'"),
        (["bf16=true", "fp16=true"], "train.bf16 and train.fp16 are both true"),
        (["gradient_checkpointing_kwargs={use_reentrant: false}"], "has no effect without train.activation_checkpoint"),
        (["dataloader_persistent_workers=true"], "has no effect without train.dataloader_num_workers"),
        (
            ["activation_checkpointing=true", "activation_checkpointing_kwargs={every: 2}"],
            "kwargs.every. Valid keys: every_n",
        ),
        (["train_sampling_strategy=sorted"], "train_sampling_strategy: Input should be 'random', 'sequential'"),
        (["save_strategy=best"], "train.save_strategy=best needs train.metric_for_best_model"),
        (["report_to=dvclive"], "train.report_to: dvclive is not installed: pip install dvclive"),
        (["report_to=nosuch"], "train.report_to: 'nosuch' is unknown. Trackers: azure_ml, clearml,"),
        (["load_best_model_at_end=true", "save_strategy=no"], "needs a checkpoint at every evaluation"),
    ],
)
def test_values_out_of_range_are_errors_before_torch_is_imported(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_table("sft", *(f"train.{override}" for override in overrides))


def test_dropping_the_only_batch_is_refused(run_stage: Callable[..., Path]) -> None:
    """12 rows make no batch of 16. The Trainer takes no step then, and says nothing of it."""
    settings = ["train.dataloader_drop_last=true", "train.per_device_train_batch_size=16"]
    with pytest.raises(AssertionError, match=r"train.dataloader_drop_last leaves nothing to train on: 12 examples"):
        run_stage("sft", *settings)


def test_the_best_model_is_kept_where_it_is_asked_for(run_stage: Callable[..., Path]) -> None:
    """By the metric that is named: of a loss that falls, the greatest is the first."""
    settings = ["train.max_steps=2", "train.learning_rate=1e-3", "train.eval_steps=1", "train.save_steps=1"]
    settings += ["train.load_best_model_at_end=true", "train.greater_is_better=true"]
    folder = run_stage("sft", "--plugin", "lora", *settings)
    kept, first, last = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in (".", "checkpoints/checkpoint-1", "checkpoints/checkpoint-2")
    )

    assert all(torch.equal(kept[name], first[name]) for name in kept)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)


def test_the_best_model_has_the_lowest_perplexity(run_stage: Callable[..., Path]) -> None:
    """Transformers would keep the highest of any metric but a loss."""
    settings = ["train.max_steps=4", "train.learning_rate=3e-3", "train.eval_steps=2", "train.save_steps=2"]
    settings += ["train.load_best_model_at_end=true", "train.metric_for_best_model=perplexity"]
    folder = run_stage("sft", "--plugin", "lora", *settings, "train.save_total_limit=null")
    kept, last = (load_file(folder / n / "adapter_model.safetensors") for n in (".", "checkpoints/checkpoint-4"))

    assert all(torch.equal(kept[name], last[name]) for name in kept)


ACTING = ("neftune_noise_alpha=5", "data_seed=7", "train_sampling_strategy=sequential", "adam_beta2=0.5", "seed=7")


def test_settings_that_act_change_what_is_trained(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--plugin", "lora", "train.learning_rate=1e-3", "train.save_strategy=no", "train.eval_strategy=no"]

    def trained(name: str, *more: str) -> dict[str, Any]:
        folder = run_stage("sft", *settings, *more, "--output", name)
        return load_file(folder / "adapter_model.safetensors")

    plain = trained("plain")
    for setting in ACTING:
        other = trained(setting.partition("=")[0], f"train.{setting}")
        assert any(not torch.equal(plain[name], other[name]) for name in plain), setting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr_scheduler_kwargs={warmth: 1}"], "train: TypeError: .* unexpected keyword argument 'warmth'"),
        (["torch_compile_backend=nosuch"], "train: ValueError: 'NOSUCH' is not a valid"),
        (
            ["load_best_model_at_end=true", "metric_for_best_model=f1", "greater_is_better=true"],
            "no held-out metric 'f1'. Metrics: loss",
        ),
        (["save_strategy=best", "metric_for_best_model=length"], "=length needs train.greater_is_better: true if"),
    ],
)
def test_values_that_a_library_refuses_are_errors_before_the_first_step(
    run_stage: Callable[..., Path], settings: list[str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message) as error:
        run_stage("sft", *(f"train.{setting}" for setting in settings))
    assert "This is unexpected" not in str(error.value)
