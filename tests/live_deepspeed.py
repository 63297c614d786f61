"""Two processes train with DeepSpeed on the CPU: ``make test-deepspeed`` runs this where DeepSpeed is installed.

The weights are those of the same run by DDP, and the saved runs open as any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import RANKINGS

from alignkit.runs import manifest

pytest.importorskip("deepspeed")

ZERO = {stage: f"train.deepspeed={{zero_optimization: {{stage: {stage}}}}}" for stage in (2, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of all stages."""
    folder = tmp_path_factory.mktemp("deepspeed")
    rows = [{"prompt": f"What is {n} and one?", "response": f"It is {n + 1}."} for n in range(24)]
    for name, content in (("sft", rows), ("rm", RANKINGS), ("dpo", RANKINGS), ("kto", RANKINGS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


WORKER = """
import json, sys
from alignkit.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        sys.exit(code)
"""


def launch(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """``alignkit`` commands, one after another in two processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ALIGNKIT_DEBUG": ""}
    worker = [sys.executable, "-c", WORKER, json.dumps(commands)]
    return subprocess.run([*launcher, *worker], env=env, capture_output=True, text=True)


def words(stage: str, folder: Path, model: Path, output: str, *more: str) -> list[str]:
    """The command of a small run of a stage."""
    base = [] if stage == "sft" else [f"{stage}.policy=base"]
    small = ["train.per_device_train_batch_size=2", "train.max_steps=3", "train.use_cpu=true", "data.eval_size=4"]
    small += ["train.learning_rate=1e-3", "train.eval_steps=3", "train.bf16=false"]
    data = ["--data", str(folder / f"{stage}.jsonl"), "--model", str(model), "--output", str(folder / output)]
    return ["train", "--plugin", stage, *data, *base, *small, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved weights of a run or a checkpoint."""
    file = next(folder.glob("adapter_model.safetensors"), folder / "model.safetensors")
    return load_file(file)


STAGES = [(stage, tuner) for stage in ("sft", "rm", "dpo") for tuner in ("lora", "full")]


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_model: Callable[..., Path]) -> dict[str, dict[tuple[str, str], Path]]:
    """The runs of each stage and tuner by DDP, ZeRO-2 and ZeRO-3."""
    runs: dict[str, dict[tuple[str, str], Path]] = {}
    for engine, more in {"ddp": [], "zero2": [ZERO[2]], "zero3": [ZERO[3]]}.items():
        commands = [
            words(stage, folder, tiny_model(), f"{engine}-{tuner}", "--plugin", tuner, *more) for stage, tuner in STAGES
        ]
        done = launch(*commands)
        assert done.returncode == 0, done.stderr[-8000:] + done.stdout[-2000:]
        runs[engine] = {(stage, tuner): folder / f"{engine}-{tuner}" / stage for stage, tuner in STAGES}
    return runs


@pytest.mark.parametrize(("stage", "tuner"), STAGES)
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_the_weights_are_those_of_ddp(engine: str, stage: str, tuner: str, trained: Any) -> None:
    run, right = trained[engine][stage, tuner], weights(trained["ddp"][stage, tuner])
    assert manifest.read(run)["processes"] == 2
    saved = weights(run)

    assert {key: tensor.shape for key, tensor in saved.items()} == {key: tensor.shape for key, tensor in right.items()}
    for key, tensor in right.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=1e-5)
