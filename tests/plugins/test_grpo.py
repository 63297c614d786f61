"""Runs of GRPO and its presets: tuners, the loss beside TRL's, drawing again, learning, exact resume, processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ppo_runs import LEARN, SMALL, iterations, trained

from alignkit.cli import main


def words(stage: str, *arguments: str) -> list[str]:
    """The words of a small run; settings of ``ppo`` are those of the stage."""
    settings = [*SMALL, f"{stage}.samples_per_prompt=4", *arguments]
    return ["--debug", "train", "--plugin", stage, *(s.replace("ppo.", f"{stage}.", 1) for s in settings)]


def grpo(*arguments: str, stage: str = "grpo") -> Path:
    assert main(words(stage, *arguments)) == 0
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs"
    return Path(output) / stage


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_grpo_runs_on_sft_and_reward_of_every_tuner(below: Callable[[str], list[str]], tuner: str) -> None:
    run = grpo(*below(tuner), "ppo.iterations=2")
    first, second = iterations(run)
    manifest = json.loads((run / "alignkit.json").read_text())

    assert first["kl"] == 0
    assert second["kl"] != 0
    assert {"score", "kl_coef", "entropy", "clip_fraction", "approx_kl", "equal_scores", "eos_rate"} <= set(first)
    assert not {"value_loss", "explained_variance"} & set(first)
    assert set(manifest["parents"]) == {"policy", "reward"}
    assert not any("value" in name or "score" in name or "reference" in name for name in trained(run))


@pytest.mark.parametrize("stage", ["grpo", "dr-grpo", "rloo"])
def test_it_learns_what_a_function_rewards(folder: Path, stage: str) -> None:
    run = grpo(*LEARN, "ppo.iterations=20", "ppo.kl_coef=0", stage=stage)
    metrics = json.loads((run / "alignkit.json").read_text())["metrics"]

    assert metrics["eval_score"] > metrics["first_eval_score"] + 0.3
