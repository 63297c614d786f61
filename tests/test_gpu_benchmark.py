"""benchmarks/gpu.py where there is no GPU; the scripts that it runs are tested in ``test_docs.py``."""

from __future__ import annotations

import argparse
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


class Parsed(Exception):  # noqa: N818
    """A script has accepted its arguments."""


def test_every_script_takes_its_arguments(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for command in gpu.BENCHMARKS.values():
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(Parsed):
            importlib.import_module(sys.argv[0].removesuffix(".py")).main()


def test_results_come_after_those_of_single_runs(gpu: Any) -> None:
    assert gpu.results_of("trl  seconds 2\n\nmedian\ntrl  2\n\nratio\n") == ["median", "trl  2", "ratio"]
    assert gpu.results_of("GiB  peak\ntiny  2\n") == ["GiB  peak", "tiny  2"]


def test_a_script_is_run_and_a_failure_says_why(gpu: Any) -> None:
    assert gpu.measure(["start_up.py", "--help"], 60)[-1].split() == ["--runs", "RUNS"]
    assert gpu.measure(["start_up.py", "--runs", "x"], 60) == [
        "failed: start_up.py: error: argument --runs: invalid int value: 'x'"
    ]
    assert gpu.measure(["start_up.py"], 0) == ["no time left: choose it with --only, or set --minutes"]
