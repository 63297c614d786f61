"""Two processes train with DeepSpeed on the CPU: ``make test-deepspeed`` runs this where DeepSpeed is installed.

The weights and the held-out results are those of one process without DeepSpeed, and the saved runs open as any other.
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

from alignkit.cli import main
from alignkit.runs import manifest

pytest.importorskip("deepspeed")

LEARNING_RATE = 1e-3
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


def launch(*commands: list[str], processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``alignkit`` commands, one after another in so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ALIGNKIT_DEBUG": ""}
    worker = [sys.executable, "-c", WORKER, json.dumps(commands)]
    return subprocess.run([*launcher, "--no-python", *worker], env=env, capture_output=True, text=True)


def words(stage: str, folder: Path, model: Path, output: str, *more: str) -> list[str]:
    """The command of a small run of a stage."""
    base = [] if stage == "sft" else [f"{stage}.policy=base"]
    base += ["dpo.response_length=4"] if stage == "dpo" else []
    small = ["train.per_device_train_batch_size=2", "train.max_steps=2", "train.use_cpu=true", "data.eval_size=5"]
    small += ["train.per_device_eval_batch_size=2"]
    small += [f"train.learning_rate={LEARNING_RATE}", "train.eval_steps=2", "train.bf16=false"]
    small += ["train.adam_epsilon=1e-4"]  # AdamW would scale gradients of almost zero, mostly rounding, to whole steps
    data = ["--data", str(folder / f"{stage}.jsonl"), "--model", str(model), "--output", str(folder / output)]
    return ["train", "--plugin", stage, *data, *base, *small, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved weights of a run or a checkpoint."""
    file = next(folder.glob("adapter_model.safetensors"), folder / "model.safetensors")
    return load_file(file)


STAGES = [(stage, tuner) for stage in ("sft", "rm", "dpo") for tuner in ("lora", "full")]


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_model: Callable[..., Path]) -> dict[str, dict[tuple[str, str], Path]]:
    """The runs of each stage and tuner in one process, and in two by ZeRO-2 and ZeRO-3 on the same batches."""
    runs: dict[str, dict[tuple[str, str], Path]] = {}
    whole = ["train.per_device_train_batch_size=4"]
    for engine, more in {"one": whole, "zero2": [ZERO[2]], "zero3": [ZERO[3]]}.items():
        commands = [
            words(stage, folder, tiny_model(), f"{engine}-{tuner}", "--plugin", tuner, *more) for stage, tuner in STAGES
        ]
        done = launch(*commands, processes=1 if engine == "one" else 2)
        assert done.returncode == 0, done.stderr[-8000:] + done.stdout[-2000:]
        runs[engine] = {(stage, tuner): folder / f"{engine}-{tuner}" / stage for stage, tuner in STAGES}
    return runs


@pytest.mark.parametrize(("stage", "tuner"), STAGES)
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_weights_and_held_out_results_are_those_of_one_process(
    engine: str, stage: str, tuner: str, trained: Any
) -> None:
    """Sums in another order round gradients in fp32: weights may differ by a fiftieth of a step."""
    one, run = trained["one"][stage, tuner], trained[engine][stage, tuner]
    before, after = manifest.read(one), manifest.read(run)
    assert (before["processes"], after["processes"]) == (1, 2)
    right, saved = weights(one), weights(run)

    assert {key: tensor.shape for key, tensor in saved.items()} == {key: tensor.shape for key, tensor in right.items()}
    for key, tensor in right.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=LEARNING_RATE / 50)
    held_out = [name for name in before["metrics"] if "eval_" in name and not name.endswith(("time", "per_second"))]
    assert {"eval_loss", "first_eval_loss"} <= set(held_out)
    for name in held_out:
        assert after["metrics"][name] == pytest.approx(before["metrics"][name], rel=1e-4, abs=1e-5), name


def test_a_run_in_bf16_keeps_its_weights_in_fp32(folder: Path, tiny_model: Callable[..., Path]) -> None:
    """DeepSpeed's own bf16 would round the adapters. The difference to DDP is that of sums in bf16."""
    for engine, more in {"ddp": [], "zero3": [ZERO[3]]}.items():
        done = launch(words("sft", folder, tiny_model(), f"{engine}-bf16", "train.bf16=true", *more))
        assert done.returncode == 0, done.stderr[-8000:]
    right, saved = (weights(folder / f"{engine}-bf16" / "sft") for engine in ("ddp", "zero3"))

    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for key, tensor in right.items():
        torch.testing.assert_close(saved[key], tensor, rtol=0, atol=2e-3)


def test_a_resumed_run_is_the_same(folder: Path, tiny_model: Callable[..., Path]) -> None:
    settings = ["train.lr_scheduler_type=constant", "train.save_steps=2", ZERO[3]]
    whole, resumed = (words("sft", folder, tiny_model(), name, *settings) for name in ("whole", "resumed"))
    done = launch([*whole, "train.max_steps=4"], [*resumed, "train.max_steps=2"])
    assert done.returncode == 0, done.stderr[-8000:]
    done = launch([*resumed, "train.max_steps=4", "--resume"])
    assert done.returncode == 0, done.stderr[-8000:]
    assert "resuming from step 2" in done.stdout

    right = weights(folder / "whole" / "sft")
    for key, tensor in weights(folder / "resumed" / "sft").items():
        torch.testing.assert_close(tensor, right[key], rtol=1e-5, atol=1e-6)


def test_runs_of_zero_3_open_as_any_other(trained: Any, folder: Path) -> None:
    runs = trained["zero3"]
    assert main(["chat", str(runs["sft", "lora"]), "--prompt", "What is 1 and one?", "--max-new-tokens", "4"]) == 0
    assert main(["score", str(runs["rm", "full"]), str(folder / "rm.jsonl"), "--output", str(folder / "scores")]) == 0
    assert main(["export", str(runs["dpo", "lora"]), "--to", str(folder / "export")]) == 0
    assert (folder / "export" / "model.safetensors").exists()


def test_what_zero_cannot_train_ends_in_one_line(folder: Path, tiny_model: Callable[..., Path]) -> None:
    done = launch(words("rm", folder, tiny_model(), "refused", ZERO[3], "rm.forward_tokens=64"))
    assert done.returncode != 0
    assert "rm.forward_tokens does not work with train.deepspeed" in done.stderr
