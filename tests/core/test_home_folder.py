"""``~`` is the home folder wherever a path is given, not a folder of that name."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

import alignkit
from alignkit import paths
from alignkit.cli import COMMANDS, MODULES, main

DATA = [{"prompt": f"{n}?", "response": "Yes."} for n in range(8)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # on Windows
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_an_output_folder_in_a_file_or_in_python(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = alignkit.check("sft", model="someone/else", data=DATA, output="~/runs").to_train[0]
    assert planned.config.folder == home / "runs" / "sft"
    assert list((home / "runs").glob("rows-*.jsonl")) == [Path(planned.config.data.path)]  # type: ignore[arg-type]

    (home / "run.yaml").write_text("model: someone/else\noutput: ~/runs\nplugins: [sft]\n")
    for output in ([], ["--output=~/runs"], ["output=~/runs"]):
        assert main(["check", "--config=~/run.yaml", *output]) == 0
        assert f"run folder  {home / 'runs' / 'sft'}" in capsys.readouterr().out
        assert main(["sweep", "--config=~/run.yaml", "--plan", "train.seed=1,2", *output]) == 0
        folder = home / "runs" if output else home / "runs" / "sweep"
        assert f"2 runs of sft in {folder}:" in capsys.readouterr().out
    assert not Path("~").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_or_folder_of_a_command(command: str) -> None:
    module = import_module(f"alignkit.cli.{MODULES.get(command, command.replace('-', '_'))}")
    given = inspect.signature(getattr(module, command.replace("-", "_")), eval_str=True).parameters.values()
    for parameter in given:
        if parameter.annotation in (Path, list[Path]):
            assert parameter.default.parser is paths.expand, f"{command} {parameter.name}"
