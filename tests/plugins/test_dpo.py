"""DPO: its losses by hand and beside TRL's, pairs, references, the shared prompt, exact resume, held-out figures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.cli import main

RANKINGS = [
    {
        "prompt": f"What is {n} and one?",
        "responses": ["Count on!", f"It is {n + 1}. Count on!", f"{n + 1}", "No idea. " * (n % 3 + 1)][: n % 3 + 2],
        "ranks": [2, 0, 1, 2][: n % 3 + 2],
    }
    for n in range(16)
]


@pytest.fixture
def train_dpo(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """``train_dpo("--plugin", "lora")``: a DPO run of a tiny model in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*arguments: str, model: str = "llama", output: str = "out", rows: Any = RANKINGS) -> Path:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "dpo", "--model", str(tiny_model(model)), "--output", str(tmp_path / output)]
        if not any("dpo.policy" in argument for argument in arguments):
            given.append("dpo.policy=base")
        small = ["train.per_device_train_batch_size=2", "data.eval_size=4", "train.use_cpu=true"]
        small += ["dpo.response_length=4"]
        assert main(["--debug", "train", *given, "--data", str(data), *small, *arguments]) == 0
        return tmp_path / output / "dpo"

    return run


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "alignkit.json").read_text()))


def logged(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
@pytest.mark.parametrize("shared", ["true", "false"])
def test_every_tuner_starts_at_ln_2(train_dpo: Callable[..., Path], train: Callable[..., Path], tuner: str, shared: str) -> None:
    sft = train("--plugin", tuner, "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    dpo = train_dpo(
        *("--plugin", tuner, f"dpo.policy={sft}", "train.max_steps=2", "train.learning_rate=0.001"),
        *(f"dpo.shared_prompt={shared}", "train.logging_steps=1"),
    )
    metrics = record(dpo)["metrics"]

    assert metrics["first_eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert logged(dpo, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_loss"] != metrics["first_eval_loss"]
    assert not (dpo / "ref").exists()
