"""Plugins installed for real, and what tests share beside the fixtures of ``alignkit.testing``."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.runs import pictures
from alignkit.testing import DEMONSTRATIONS

ROOT = Path(__file__).parents[1]

__all__ = ["DEMONSTRATIONS"]

pytest_plugins = [
    "browsers",
    "chat_servers",
    "data_files",
    "hub_server",
    "label_clients",
    "label_pages",
    "parsed_once",
    "ppo_runs",
    "reward_runs",
    "small_models",
    "stage_runs",
    "upload_server",
    "vllm_servers",
]

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background; commands of tests would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow tests, so that in the end no process waits for one of them."""
    items.sort(key=lambda item: "slow" not in item.keywords)


_modules = 0  # that the last test had imported


def pytest_runtest_setup() -> None:
    """Keep collections of garbage from walking through the libraries: each run collects, and these never go."""
    global _modules
    if len(sys.modules) > _modules + 20:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tests train, and a picture takes longer than some of them do."""
    if "draws_curves" in request.keywords:
        request.getfixturevalue("run_stage")  # which draws none
        monkeypatch.setattr("alignkit.runs.curves.can_draw", pictures.can_draw)
    else:
        monkeypatch.setattr("alignkit.runs.curves.can_draw", lambda: False)
        monkeypatch.setenv(processes.NO_PICTURES, "1")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``install("simpo", code)``: a plugin with the metadata of a real distribution, on ``sys.path`` for this test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def put(
        name: str, code: str, distribution: str = "", version: str = "0.1", requires: str = "", attribute: str = ""
    ) -> None:
        distribution = distribution or f"alignkit-{name}"
        module = distribution.replace("-", "_") + "_plugin"
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\nSummary: {name} for a test\n"
        (info / "METADATA").write_text(metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        (info / "entry_points.txt").write_text(f"[alignkit]\n{name} = {module}{attribute}\n")

    yield put
    for module in site.glob("*.py"):
        sys.modules.pop(module.stem, None)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills, once for all processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    made = folder.with_suffix(".made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


class Venv:
    """A virtual environment of its own that sees the libraries of this one, and takes what pip installs."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(subprocess.check_output([self.python, "-c", code], text=True).strip())
        (self.site / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Python modules: ``run("alignkit", "plugins")``; nothing comes from the network."""
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONWARNINGS": "", "ALIGNKIT_DEBUG": ""}
        words = [self.python, "-P", "-m", *command]
        return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**os.environ, **offline})

    def files(self) -> set[str]:
        """What is in its site-packages."""
        return {str(path.relative_to(self.site)) for path in self.site.rglob("*")}


@pytest.fixture
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """A fresh environment."""
    return Venv(tmp_path_factory.mktemp("venv"))


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every command compute in fp32, whatever the device does well."""
    import torch

    from alignkit.models import device_and_dtype

    monkeypatch.setattr(device_and_dtype, "run_dtype", lambda train: torch.float32)


@pytest.fixture
def train(run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``train("--plugin", "lora", "train.max_steps=2")``: an SFT run of a tiny model in this process -> its folder."""

    def run(*arguments: str, model: str = "llama", output: str = "out") -> Path:
        given = ["--model", str(tiny_model(model)), "--output", str(tmp_path / output), "train.max_steps=-1"]
        return run_stage("sft", *given, *arguments)

    return run


def on_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``alignkit`` in two processes on the CPU of this machine."""
    return processes.run_several(2, *arguments, env=on_cpu())


def on_cpu() -> dict[str, str]:
    """The environment of one of several processes, which finds plugins of ``install`` under ``site``.

    It has no GPU: a machine may have one only.
    """
    path = os.pathsep.join(["site", *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ALIGNKIT_DEBUG": "", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


class Waits(TorchDispatchMode):
    """Records where this project's code makes a GPU's host wait: it reads a value, or copies one to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {each.device for each in (*args, result) if isinstance(each, torch.Tensor)}
        copied = name in ("_to_copy", "copy_") and len(devices) > 1 and not (kwargs or {}).get("non_blocking")
        if copied or name == "_local_scalar_dense":
            stack = [frame for frame in traceback.extract_stack() if f"{os.sep}torch{os.sep}" not in frame.filename]
            place = Path(stack[-2].filename)  # the last is this method's
            if place.is_relative_to(ROOT) and "site-packages" not in place.parts:
                self.places.append(f"{place.name}:{stack[-2].lineno}")
        return result
