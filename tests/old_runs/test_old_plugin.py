"""A plugin for an earlier version of the plugin API works, or is refused in one line that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import PluginError
from alignkit.cli import main
from alignkit.registry import Registry

CODE = Path(__file__).with_name("old_plugin.py").read_text()
OLD = ["--plugin", "old"]
UPGRADE = "To upgrade both: pip install -U alignkit alignkit-old. Or run without --plugin old"
OTHER = f"It is written for another version of alignkit. {UPGRADE}"


@pytest.fixture
def old(install: Callable[..., None]) -> None:
    install("old", CODE, requires="alignkit>=0.1,<0.2")


def failure(run_stage: Callable[..., Path], *arguments: str) -> str:
    with pytest.raises(AssertionError) as error:
        run_stage(*arguments)
    return str(error.value)


def test_what_has_not_changed_since_works(run_stage: Callable[..., Path], old: None) -> None:
    assert (run_stage("sft", *OLD, "loss.name=old-focal", "loss.gamma=1") / "alignkit.json").exists()


def test_a_stage_or_an_engine_that_imports_what_has_moved_is_named(run_stage: Callable[..., Path], old: None) -> None:
    plugin = "alignkit: error: plugin old (alignkit-old 0.1) failed in alignkit_old_plugin.py line "
    stage = failure(run_stage, "old-stage", *OLD)
    engine = failure(run_stage, "grpo", *OLD, "rollout.name=old-one-by-one", "grpo.policy=base")

    assert stage == f"{plugin}34: ModuleNotFoundError: No module named 'alignkit.chat_template'. {OTHER}"
    assert engine == f"{plugin}40: ModuleNotFoundError: No module named 'alignkit.sampling'. {OTHER}"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            CODE.replace("import Demo", "import old_name, Demo"),
            "could not be imported: ImportError: cannot import name 'old_name'",
        ),
        (
            CODE.replace('loss="nll",', 'loss="nll", old_field=1,'),
            "failed to declare its components: TypeError: Stage.__init__() got an unexpected keyword argument",
        ),
    ],
    ids=["name", "field"],
)
def test_a_name_or_a_field_that_is_gone_is_an_error_with_what_to_do(
    install: Callable[..., None], code: str, why: str
) -> None:
    install("old", code)

    with pytest.raises(PluginError) as error:
        Registry().activate("old")
    assert str(error.value).startswith(f"plugin old (alignkit-old 0.1) {why}")
    assert str(error.value).endswith(f". {OTHER}")


def test_the_next_version_refuses_it_before_it_is_imported(
    old: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alignkit.registry.registry.__version__", "0.2.0")
    (tmp_path / "run.yaml").write_text("plugins: [old, sft]\nloss: {name: old-focal}\n")
    refused = f"plugin old (alignkit-old 0.1) requires alignkit<0.2,>=0.1, but 0.2.0 is installed. {UPGRADE}"

    for words in (["--plugin", "sft", *OLD], ["--config", str(tmp_path / "run.yaml")]):
        assert main(["train", *words, "--output", str(tmp_path / "runs")]) == 2
        assert capsys.readouterr().err == f"alignkit: error: {refused}\n"
    assert "alignkit_old_plugin" not in sys.modules
    assert not (tmp_path / "runs").exists()
