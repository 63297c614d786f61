"""benchmarks/gpu.py where there is no GPU; the scripts that it runs are tested in ``test_docs.py``."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the benchmarks")
def test_without_a_gpu_it_ends_with_one_line_and_status_2() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.py needs a CUDA GPU, and PyTorch finds none here\n"


def test_every_script_takes_its_arguments(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in gpu.BENCHMARKS.values():
        script, *arguments = command.split()
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--help"])  # arguments before --help are parsed
        with pytest.raises(SystemExit) as ended:
            getattr(module, "arguments" if script == "decode.py" else "main")()
        assert ended.value.code == 0, command


def test_results_are_those_of_the_script(gpu: Any) -> None:
    header, computed, *measured = gpu.measure(["ppo_memory.py", "--shapes", "tiny", "--tuners", "lora"], 300)

    assert header.startswith("GiB")
    assert computed.startswith("tiny   lora")
    assert len(measured) == torch.cuda.is_available()
    assert gpu.results_of("alignkit  seconds 2\n\nmedian\nseconds 2\n\nratio\n") == ["median", "seconds 2", "ratio"]


def test_a_benchmark_without_results_says_why(gpu: Any) -> None:
    assert gpu.measure(["ppo_memory.py"], 0) == ["no time left: choose it with --only, or set --minutes"]
    (line,) = gpu.measure(["ppo_memory.py", "--shapes", "9B"], 300)
    assert line.startswith("failed: ppo_memory.py: error: argument --shapes")
