"""``alignkit export --gguf --ollama --push``: in one command, or added to an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from upload_server import UploadServer

from alignkit.cli import main
from alignkit.exporting import gguf

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in huggingface_hub


@pytest.fixture
def run(train: Callable[..., Path], fp32: None) -> Path:
    return train("--plugin", "lora", "train.max_steps=2", "data.eval_size=2")


@pytest.fixture
def llama_cpp(tmp_path: Path) -> str:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("llama_to_gguf.py"), folder / gguf.CONVERTER)
    return str(folder)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_an_export_is_converted_described_and_uploaded(
    run: Path, llama_cpp: str, hub: UploadServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "policy"
    assert main(["export", str(run), "--to", str(to)]) == 0
    exported = files(to)
    weights = (to / "model.safetensors").stat().st_mtime_ns

    more = ["--gguf", "bf16", "--llama-cpp", llama_cpp, "--ollama", "--push", "me/policy"]
    capsys.readouterr()
    assert main(["export", str(run), "--to", str(to), *more]) == 0
    assert f"{to} holds this export already" in capsys.readouterr().out
    assert (to / "model.safetensors").stat().st_mtime_ns == weights
    assert files(to) == {*exported, "policy-bf16.gguf", "Modelfile"}
    assert "FROM ./policy-bf16.gguf\n" in (to / "Modelfile").read_text()
    assert set(hub.repositories["me/policy"]["files"]) == files(to) - {"export.json"}
    assert hub.repositories["me/policy"]["private"]


def test_what_cannot_be_done_is_an_error_before_anything_is_exported(
    run: Path, hub: UploadServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["export", str(run), "--to", str(tmp_path / "policy"), *arguments]) == 2
        assert not (tmp_path / "policy").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setenv("ALIGNKIT_DEBUG", "")
    monkeypatch.setenv("PATH", "")
    hub.repositories["me/policy"] = {}
    assert "--llama-cpp" in error("--gguf", "q8_0")
    assert "the repository exists already" in error("--push", "me/policy")
    assert "--llama-cpp has no effect without --gguf" in error("--llama-cpp", str(tmp_path))
    assert "--public has no effect without --push" in error("--public")
    record = json.loads((run / "alignkit.json").read_text())
    (run / "alignkit.json").write_text(json.dumps({**record, "role": "reward"}))
    assert "--ollama is for policies" in error("--ollama")


def test_another_export_in_the_folder_is_not_touched(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "policy"
    assert main(["export", str(run), "--to", str(to)]) == 0
    before = files(to)

    for other in (["--dtype", "float32"], ["--max-shard-size", "1MB"]):
        assert main(["export", str(run), "--to", str(to), *other, "--ollama"]) == 2
    (to / "chat_template.jinja").write_text("changed")
    assert main(["export", str(run), "--to", str(to), "--ollama"]) == 2
    assert files(to) == before
    for content in ("{}", "[]", '{"export": 1}', '{"export": {}, "run": null}'):
        (to / "export.json").write_text(content)
        assert main(["export", str(run), "--to", str(to), "--ollama"]) == 2
        assert f"export: {to} exists" in capsys.readouterr().err
