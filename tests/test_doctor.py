"""``alignkit doctor`` shows what is installed, and names what does not fit."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
import torch

from alignkit.cli import doctor, main


def report(capsys: pytest.CaptureFixture[str], status: int) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == status
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_versions_device_and_extras_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    checks = report(capsys, status=0)

    assert checks["torch"]["value"] == importlib.metadata.version("torch")
    assert checks["extra label"]["value"].startswith("markdown-it-py ")
    assert "extra dev" not in checks
    assert checks["device"]["value"].startswith("cpu" if not torch.cuda.is_available() else "NVIDIA")
    assert checks["dtype"]["value"].split(",")[0] in ("bfloat16", "float32", "float16")
    assert "GiB free" in checks["this folder"]["value"]
    assert main(["doctor"]) == 0
    assert f"  torch  {importlib.metadata.version('torch')}\n" in capsys.readouterr().out


def test_what_does_not_fit_is_a_problem_and_a_missing_extra_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = ["torch>=99", "no-such-package>=1", "no-such-plotter; extra == 'plot'", "peft<0.1; extra == 'old'"]
    monkeypatch.setattr(doctor, "requires", lambda name: declared)
    checks = report(capsys, status=1)

    assert checks["torch"]["problem"] == "alignkit needs torch>=99"
    assert checks["no-such-package"]["problem"] == "no-such-package is not installed: alignkit needs no-such-package>=1"
    assert checks["extra plot"]["value"] == "not installed: no-such-plotter. pip install 'alignkit[plot]'"
    assert checks["extra plot"]["problem"] == ""
    assert checks["extra old"]["problem"] == "alignkit needs peft<0.1"


def test_a_gpu_that_torch_cannot_use_and_a_full_disk_are_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    which: Any = {"nvidia-smi": "/usr/bin/nvidia-smi"}.get
    monkeypatch.setattr(doctor.shutil, "which", which)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    usage = doctor.shutil.disk_usage(".")._replace(free=2**29)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    checks = report(capsys, status=1)

    assert "install a CUDA build of torch" in checks["device"]["problem"]
    assert checks["this folder"]["problem"] == "less than 1 GiB is free"
