"""Every stage, and other commands with a model, on a GPU made of main memory, where tensors left on the CPU raise.

Stages run whole: with sampling, scoring, evaluation, checkpoints and saving; LoRA in bf16, full in fp32. Not covered:

- 4-bit weights: the weight class of bitsandbytes cannot hold a tensor of a subclass
- fp16: accelerate allows it on a fixed list of devices
- CUDA itself: its random number generators, pinned memory, and the few branches on ``device.type == "cuda"``
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
import torch

from alignkit.cli import main
from alignkit.testing import DATA

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the other tests show the same")

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
    commands: dict[str, Outcome]
    expressions: dict[str, Outcome]
    output: str
    folder: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of every stage."""
    folder = tmp_path_factory.mktemp("data")
    for kind in STAGES.values():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA[kind]))
    return folder


@pytest.fixture(scope="module")
def command(tiny_model: Callable[..., Path], data: Path) -> Callable[..., list[str]]:
    """``command("sft", "lora", folder)``: the words of a short run, which continues those of the stages before it."""

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


def after_training(lora: Path, data: Path) -> dict[str, list[str]]:
    """Other commands with a model, by name; ``lora`` is the folder of the runs with LoRA."""
    sft, rm, ppo = (str(lora / stage) for stage in ("sft", "rm", "ppo"))
    output, ranked = (["--output", str(lora / name)] for name in ("output.jsonl", "ranked.jsonl"))
    return {
        "sample": ["sample", sft, str(data / "prompts.jsonl"), "-k", "2", "--max-new-tokens", "4", *output],
        "score": ["score", rm, str(data / "demonstrations.jsonl")],
        "rank": ["rank", str(data / "rankings.jsonl"), "--by", "local", f"judge.model={sft}", *ranked],
        "compare": ["compare", sft, ppo, "--reward", rm, "--limit", "2", "--max-new-tokens", "4"],
    }


@pytest.fixture(scope="module")
def on_gpu(command: Callable[..., list[str]], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All commands in one process that has the device."""
    folder = tmp_path_factory.mktemp("gpu")
    commands = {f"{stage} {tuner}": command(stage, tuner, folder) for tuner in TUNERS for stage in STAGES}
    commands["resume"] = [*commands["ppo lora"], "--resume", "train.max_steps=4"]
    commands |= after_training(folder / "lora", data)
    done = processes.run(
        json.dumps({"commands": list(commands.values()), "expressions": list(MIXED)}),
        script=Path(__file__).with_name("fake_gpu.py"),
        env={
            **os.environ,
            "ALIGNKIT_DEBUG": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XDG_CACHE_HOME": str(folder / "cache"),  # without verdicts
        },
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    results = dict(zip(commands, outcomes["commands"], strict=True))
    return Runs(results, dict(zip(MIXED, outcomes["expressions"], strict=True)), done.stderr, folder)


NAMES = [*(f"{stage} {tuner}" for tuner in TUNERS for stage in STAGES), "resume", "sample", "score", "rank", "compare"]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_all_tensors_on_the_gpu(name: str, on_gpu: Runs) -> None:
    status, errors = on_gpu.commands[name]

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
