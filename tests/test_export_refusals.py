"""What ``alignkit export`` refuses: one line, status 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alignkit.cli import main


@pytest.fixture
def run(run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A LoRA run on a base of its own."""
    shutil.copytree(tiny_model(), tmp_path / "base")
    return run_stage("sft", "--plugin", "lora", "--model", str(tmp_path / "base"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(run, "--dtype", "float8")``: the line on stderr. Nothing appears beside the run's folders."""

    def refuse(run: Path, *options: str, to: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(["export", str(run), "--to", str(to or tmp_path / "exported"), *options]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alignkit: error:")]
        return line

    return refuse


def test_options_and_folders(run: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no dtype 'float8'" in refused(run, "--dtype", "float8")
    assert "no base 'orginal'. Did you mean 'original'?" in refused(run, "--base", "orginal")
    assert "'5 apples' is not a size" in refused(run, "--max-shard-size", "5 apples")
    (tmp_path / "there").mkdir()
    assert "there exists. Remove it" in refused(run, to=tmp_path / "there")
    assert "is not a finished run" in refused(tmp_path / "nothing")


def test_an_unfinished_run(run: Path, refused: Callable[..., str]) -> None:
    unfinished = run.rename(run.with_name("sft.unfinished"))

    assert f"{run} is not finished" in refused(run)
    assert f"{unfinished} is not finished" in refused(unfinished)


def test_a_base_that_changed_or_moved(run: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert f"{run} is an adapter for {tmp_path / 'base'}, whose weights have changed since" in refused(run)

    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert f"adapter for the model in {tmp_path / 'base'}, which does not exist" in refused(run)


def test_a_run_that_changed(run: Path, refused: Callable[..., str]) -> None:
    file = run / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)

    assert f"the weights in {run} have changed since it was trained" in refused(run)


def test_a_run_without_a_policy(run: Path, refused: Callable[..., str]) -> None:
    record = json.loads((run / "alignkit.json").read_text())
    (run / "alignkit.json").write_text(json.dumps({**record, "role": "value"}))

    assert f"{run} is a value (stage sft). Policies and reward models can be exported" in refused(run)


def test_the_original_base_of_a_full_model(
    run_stage: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = run_stage("sft", "--plugin", "full", "--output", str(tmp_path / "full"))

    assert "a full model, which has no base to merge into" in refused(run, "--base", "original")


def test_a_merge_that_is_wrong(
    run_stage: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT leaves the adapter out: the export is the base."""
    run = run_stage("sft", "--plugin", "lora", "train.learning_rate=0.1", "train.max_steps=8")
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda layer, **_: None)

    for dtype in ("float32", "float16"):
        assert "differs from the run: the KL by 0." in refused(run, "--dtype", dtype)
    assert "what training changed is missing" in refused(run, "--dtype", "bfloat16")


def test_an_adapter_that_cannot_be_merged(
    install: Callable[..., None], run_stage: Callable[..., Path], refused: Callable[..., str]
) -> None:
    install(
        "soft",
        """
        import peft
        from alignkit import Tuner, hookimpl

        def wrap(config, model, role):
            return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

        @hookimpl
        def alignkit_model():
            return [Tuner(name="soft", summary="train a prompt", load=lambda config, dtype: {}, wrap=wrap,
                          adapters=True, trains="inputs")]
        """,
    )
    run = run_stage("sft", "--plugin", "soft")

    assert f"{run} was trained with tuner 'soft', whose trained inputs cannot be merged" in refused(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(run: Path, refused: Callable[..., str], small_disk: Path) -> None:
    assert "No space left on device" in refused(run, to=small_disk / "exported")
    assert os.listdir(small_disk) == []
