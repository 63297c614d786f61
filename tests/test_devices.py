"""Several GPUs, several processes: what would go wrong without a word, or hang."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers


def test_several_gpus_without_a_launcher_train_on_one_and_that_is_said(
    train: Callable[..., Path],
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(
        "look",
        """
        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import TrainerCallback

            class Look(TrainerCallback):
                def on_train_begin(self, args, state, control, **kwargs):
                    print("batch", args.train_batch_size, "on", args.n_gpu)

            return [Look()]
        """,
    )
    plain = transformers.TrainingArguments.__post_init__

    def with_four_gpus(args: Any) -> None:
        plain(args)
        args._n_gpu = 4

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", with_four_gpus)
    train("--plugin", "look", "train.max_steps=1", "train.per_device_train_batch_size=2")

    said = capsys.readouterr().out
    assert "training on one of 4 GPUs. To use all of them: alignkit launch --processes 4 -- train ..." in said
    assert "batch 2 on 1" in said


@pytest.mark.parametrize(
    ("train", "bf16", "expected"),
    [
        ({}, True, "bfloat16"),
        ({}, False, "float16"),
        ({"fp16": False}, True, "bfloat16"),
        ({"fp16": False}, False, "float32"),
        ({"bf16": False}, True, "float32"),
        ({"bf16": False}, False, "float32"),
        ({"bf16": True, "fp16": False}, False, "bfloat16"),
        ({"fp16": True}, True, "float16"),
    ],
)
def test_the_number_format_is_the_devices_unless_it_is_set(
    train: dict[str, bool], bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.models import device_and_dtype

    monkeypatch.setattr(device_and_dtype, "run_device", lambda train: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert device_and_dtype.run_dtype(train) is getattr(torch, expected)


def test_a_cpu_does_not_train_in_fp16(train: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match=r"train.fp16: a CPU has no loss scaling.*: remove it"):
        train("train.fp16=true")


def test_less_pretraining_text_than_processes_is_refused() -> None:
    from alignkit import ConfigError
    from alignkit.online.config import microbatches
    from alignkit_ppo.config import PPOConfig

    config = PPOConfig(batch_size=8, minibatches=1, ptx_coef=1.0, ptx_batch_size=1)
    assert microbatches("ppo", config, 4, 1) == (4, 2)
    with pytest.raises(ConfigError, match="ptx_batch_size=1 is less than one text for each of the 2 processes"):
        microbatches("ppo", config, 4, 2)
    assert microbatches("ppo", PPOConfig(batch_size=8, minibatches=1, ptx_batch_size=1), 4, 2) == (4, 1)


def test_a_run_that_was_killed_before_its_renaming_goes_on_in_every_process(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("train.max_steps=1")
    folder.rename(folder.with_name("sft.unfinished"))
    surroundings = folder.with_name("sft.unfinished") / "checkpoints" / "surroundings.json"
    surroundings.write_text(surroundings.read_text().replace('processes": "1"', 'processes": "2"'))
    monkeypatch.setattr("alignkit.training.run.Run.processes", 2)

    train("train.max_steps=1", "--resume")  # the others wait for the first one, which must not end before them
    assert "resuming from step 1" in capsys.readouterr().out
    assert (folder / "alignkit.json").exists()
