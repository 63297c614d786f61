"""An adapter is never loaded on a base whose weights are not those that it was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import alignkit
from alignkit.cli import main
from alignkit.errors import ConfigError
from alignkit.models import adapters
from alignkit.runs import manifest


def change(folder: Path) -> None:
    """Write other weights into a model folder."""
    file = folder / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_an_adapter_of_a_full_run_that_was_trained_again(
    run_stage: Callable[..., Path],
    tiny_model: Callable[..., Path],
    tiny_data: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sft = run_stage("sft", "--plugin", "full")
    reward = run_stage("rm", "--plugin", "lora", f"rm.policy={sft}", "--output", str(tmp_path / "on"))
    policy = run_stage("dpo", "--plugin", "lora", f"dpo.policy={sft}", "--output", str(tmp_path / "on"))
    change(sft)
    check = ["check", "--output", str(tmp_path / "next"), "--data"]
    commands = [
        (policy, [*check, str(tiny_data("rankings")), "--plugin", "dpo", f"dpo.policy={policy}"]),
        (reward, [*check, str(tiny_data("prompts")), "--plugin", "grpo", "grpo.policy=base", f"reward.path={reward}"]),
        (policy, ["chat", str(policy), "--prompt", "Hi"]),
        (reward, ["score", str(reward), str(tiny_data("rankings"))]),
    ]

    for run, command in commands:
        model = ["--model", str(tiny_model())] if "grpo" in command else []
        assert main([*command, *model]) == 2
        assert f"{run} is an adapter for {sft}, whose weights have changed since" in capsys.readouterr().err
        with pytest.raises(ConfigError, match="whose weights have changed since"):
            alignkit.load(run).model()


def test_the_start_of_a_full_run_that_has_changed(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """``compare --checkpoints`` measures the KL to it."""
    shutil.copytree(tiny_model(), tmp_path / "base")
    run = run_stage("sft", "--plugin", "full", "--model", str(tmp_path / "base"))
    change(tmp_path / "base")

    with pytest.raises(ConfigError, match="sft was trained from .*base, whose weights have changed since"):
        adapters.open_base(run, manifest.read(run))
