"""GGUF files of an export, written by a converter of the tests and, if it is there, by llama.cpp's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkit import AlignkitError, bundled
from alignkit.exporting import gguf

CHATML = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def exported(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of an export, of a model whose predictions differ from token to token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("exported") / "policy"
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "policy"))


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    """A folder like llama.cpp's with a converter of Llama models."""
    place = tmp_path / "llama.cpp"
    place.mkdir()
    shutil.copy(Path(__file__).with_name("llama_to_gguf.py"), place / gguf.CONVERTER)
    return gguf.find_converter(place)


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_a_file_that_equals_the_export_is_kept(kind: gguf.Kind, folder: Path, converter: Path) -> None:
    lines: list[str] = []
    file = gguf.write(folder, kind, converter, lines.append)

    assert file == folder / f"policy-{kind}.gguf"
    assert "KL" in lines[-1]
    largest = {"bf16": 1e-4, "q8_0": 0.3}[kind]
    assert largest_difference(folder, file) < largest


def largest_difference(folder: Path, file: Path) -> float:
    """Of a log-probability of a fixed sequence, in plain Transformers."""
    from transformers import AutoModelForCausalLM, GgufConfig

    ids = torch.arange(1, 40)[None]
    read = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    with torch.no_grad():
        a, b = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)(ids).logits.log_softmax(-1)
            for given in ({}, read)
        )
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fails", "failed: NotImplementedError: BPE pre-tokenizer was not recognized"),
        ("garbage", "the converter wrote a file that cannot be read: "),
        ("wrong", "differs from the export: KL "),
        ("no template", "did not write the chat template of the export"),
    ],
)
def test_a_wrong_conversion_is_an_error_and_leaves_the_export_as_it_was(
    fault: str, message: str, folder: Path, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    with pytest.raises(AlignkitError, match=message) as raised:
        gguf.write(folder, "bf16", converter, print)

    assert "\n" not in str(raised.value)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_the_converter_is_found_or_asked_for(converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AlignkitError, match=r"there is no convert_hf_to_gguf.py in it"):
        gguf.find_converter(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AlignkitError, match="name its folder with --llama-cpp"):
        gguf.find_converter(None)
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent))
    assert gguf.find_converter(None) == converter
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AlignkitError, match="pip install gguf"):
        gguf.find_converter(None)


@pytest.mark.slow
def test_the_converter_of_llama_cpp_writes_what_transformers_reads_back(tmp_path: Path) -> None:
    llama_cpp = os.environ.get("LLAMA_CPP")
    if llama_cpp is None and shutil.which(gguf.CONVERTER) is None:
        pytest.skip("needs llama.cpp: set LLAMA_CPP to its folder, or put convert_hf_to_gguf.py on the PATH")
    folder = Path(shutil.copytree(bundled.convert("bundled:smollm2-135m", print), tmp_path / "smollm2"))

    gguf.write(folder, "q8_0", gguf.find_converter(Path(llama_cpp) if llama_cpp else None), print)
