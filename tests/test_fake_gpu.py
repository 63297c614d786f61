"""Whole runs of every stage on a GPU made of main memory, where a tensor left on the CPU raises as on CUDA.

Sampling, scoring, evaluation, checkpoints and saving are included. LoRA runs in bf16 with autocast, full in fp32. Not
covered:

- 4-bit weights: the weight class of bitsandbytes cannot hold a tensor of a subclass
- fp16: its loss scaler needs CUDA
- CUDA itself: its random number generators, pinned memory, and the few branches on ``device.type == "cuda"``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from alignkit.cli import main
from alignkit.testing import DATA

STAGES = {"sft": "demonstrations", "rm": "rankings", "dpo": "preferences", "ppo": "prompts"}
TUNERS = {"lora": "train.bf16=true", "full": "train.bf16=false"}
PPO = ["ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=6"]
SETTINGS = {  # the two tuners take different paths
    ("sft", "full"): ["sft.packing=true"],
    ("rm", "full"): ["rm.shared_prompt=false"],
    ("dpo", "lora"): ["dpo.response_length=4"],
    ("dpo", "full"): ["dpo.response_length=4", "dpo.shared_prompt=false", "dpo.precompute_ref_log_probs=true"],
    ("ppo", "lora"): [*PPO, "ppo.samples_per_prompt=2", "ppo.keep=best"],
    ("ppo", "full"): [*PPO, "ppo.value=head", "ppo.ema=0.9", "ppo.ptx_coef=1"],
}
MIXED = {  # whether CUDA raises
    "ones(2, device=gpu) + ones(2)": True,
    "ones(2, device=gpu) + ones(())": False,
    "ones((), device=gpu) + ones(2)": True,
    "stack([ones((), device=gpu), ones(())])": True,
    "ones(2, device=gpu)[zeros(2).long()]": False,
    "ones(2)[zeros(2, device=gpu).long()]": True,
    "ones(2).copy_(ones(2, device=gpu)) + ones(2)": False,
}
Outcome = tuple[int | None, list[str]]  # what it returned, and errors of devices


class Runs(NamedTuple):
    commands: dict[tuple[str, str], Outcome]
    expressions: dict[str, Outcome]
    output: str
    folder: Path


@pytest.fixture(scope="module")
def command(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """``command("sft", "lora", folder)``: the words of a run of one step, after those of the stages before it."""
    data = tmp_path_factory.mktemp("data")
    for kind in STAGES.values():
        (data / kind).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA[kind]))

    def words(stage: str, tuner: str, folder: Path) -> list[str]:
        output = folder / tuner
        given = ["--debug", "train", "--plugin", stage, "--plugin", tuner, "--model", str(tiny_model())]
        given += ["--output", str(output), "--data", str(data / f"{STAGES[stage]}.jsonl"), "data.eval_size=2"]
        given += ["train.max_steps=2" if stage == "ppo" else "train.max_steps=1", TUNERS[tuner]]
        given += ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=2"]
        parents = [] if stage == "sft" else [f"{stage}.policy={output / 'sft'}"]
        parents += [f"reward.path={output / 'rm'}"] if stage == "ppo" else []
        return [*given, *parents, *SETTINGS.get((stage, tuner), [])]

    return words


@pytest.fixture(scope="module")
def on_gpu(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every stage with every tuner, in one process that has the device."""
    folder = tmp_path_factory.mktemp("gpu")
    names = [(stage, tuner) for tuner in TUNERS for stage in STAGES]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fake_gpu.py")],
        input=json.dumps({"commands": [command(*name, folder) for name in names], "expressions": list(MIXED)}),
        env={**os.environ, "ALIGNKIT_DEBUG": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    commands = dict(zip(names, outcomes["commands"], strict=True))
    return Runs(commands, dict(zip(MIXED, outcomes["expressions"], strict=True)), done.stderr, folder)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_with_all_tensors_on_the_gpu(stage: str, tuner: str, on_gpu: Runs) -> None:
    status, errors = on_gpu.commands[stage, tuner]

    assert errors == []  # some are caught: after one in the decode loop, Transformers' generate samples
    assert status == 0, on_gpu.output


def test_the_gpu_computes_what_the_cpu_does(
    command: Callable[..., list[str]], on_gpu: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    for stage in STAGES:
        assert main([*command(stage, "full", tmp_path), "train.use_cpu=true"]) == 0
        expected, metrics = (
            json.loads((folder / "full" / stage / "alignkit.json").read_text())["metrics"]
            for folder in (tmp_path, on_gpu.folder)
        )
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5), stage


@pytest.mark.parametrize("expression", MIXED)
def test_tensors_of_both_devices_raise_where_cuda_raises(expression: str, on_gpu: Runs) -> None:
    _, errors = on_gpu.expressions[expression]

    assert len(errors) == MIXED[expression]
