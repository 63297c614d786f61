"""Fixtures that train a small run of one stage in this process; ``conftest.py`` registers them for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.cli import main

RM_RANKINGS = [
    {
        "prompt": f"What is {n} and one?",
        "responses": ["Count on!", f"It is {n + 1}. Count on!", f"{n + 1}", "No idea. " * (n % 3 + 1)][: n % 3 + 2],
        "ranks": [2, 0, 1, 2][: n % 3 + 2],
    }
    for n in range(16)
]


@pytest.fixture
def train_rm(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``train_rm("--plugin", "lora")``: a reward run of a tiny model in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*arguments: str, model: str = "llama", output: str = "out", rows: Any = RM_RANKINGS) -> Path:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "rm", "--model", str(tiny_model(model)), "--output", str(tmp_path / output)]
        if not any("rm.policy" in argument or "--config" in argument for argument in arguments):
            given.append("rm.policy=base")
        small = ["train.per_device_train_batch_size=2", "data.eval_size=4", "train.use_cpu=true"]
        assert main(["--debug", "train", *given, "--data", str(data), *small, *arguments]) == 0
        return tmp_path / output / "rm"

    return run


@pytest.fixture
def sgd(install: Callable[..., None]) -> None:
    """An optimizer whose step is the gradient, so that equal steps mean equal gradients."""
    install(
        "sgd",
        """
        from alignkit import Optimizer, hookimpl

        def build(config, args):
            import torch
            return torch.optim.SGD, {"lr": args.learning_rate}

        @hookimpl
        def alignkit_optimizer():
            return [Optimizer(name="sgd", summary="plain gradient descent", build=build)]
        """,
    )
