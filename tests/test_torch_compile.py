"""``train.torch_compile``: what is compiled computes the same, in sft and in ppo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import GOLD, logs, ppo

from alignkit.runs import manifest

pytestmark = pytest.mark.slow  # tracing takes half a minute

EAGER = "train.torch_compile_backend=eager"  # traced and run as traced, without a compiler


@pytest.fixture
def graphs() -> Any:
    """Counts of what torch has compiled; nothing is compiled at first."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def test_sft_compiles_the_model_and_trains_the_same(
    run_stage: Callable[..., Path], graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--plugin", "lora", "train.learning_rate=1e-3", "train.bf16=false", "train.save_strategy=no"]
    plain = manifest.read(run_stage("sft", *settings, "--output", "plain"))["metrics"]
    assert not graphs["unique_graphs"]
    compiled = manifest.read(run_stage("sft", *settings, EAGER, "--output", "compiled"))["metrics"]

    assert graphs["unique_graphs"] > 0
    for name in ("train_loss", "first_eval_loss", "eval_loss"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5), name


def test_ppo_trains_the_same(folder: Path, graphs: Any) -> None:
    settings = ["--plugin", "lora", *GOLD, "ppo.iterations=1", "ppo.eval_every=1"]
    plain = logs(ppo(*settings, "--output", "plain"))
    compiled = logs(ppo(*settings, EAGER, "--output", "compiled"))
    assert graphs["unique_graphs"] > 0
    for first, second in zip(plain, compiled, strict=True):
        for name in (name for name in first if name.startswith("eval_") or "loss" in name):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
