"""The fixtures that plugin authors get."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.readers import READERS
from alignkit.testing import DATA

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "mistral", "phi3", "gpt2"])
def test_a_tiny_model_is_small_and_real(tiny_model: Callable[..., Path], architecture: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("What is one and one?", return_tensors="pt").input_ids

    assert model.config.model_type == architecture
    assert model.num_parameters() < 200_000
    assert model(ids).logits.isfinite().all()
    assert tiny_model(architecture) == folder


@pytest.mark.parametrize("kind", DATA)
def test_tiny_data_is_of_its_kind(tiny_data: Callable[[str], Path], kind: str) -> None:
    rows = [row for _, row in READERS[".jsonl"](tiny_data(kind))]

    assert rows == DATA[kind]


def test_an_unknown_kind_of_data_is_an_error_with_the_closest_name(tiny_data: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="no kind of data 'ranking'. Did you mean 'rankings'"):
        tiny_data("ranking")


def test_run_stage_trains_what_a_stage_needs_first(run_stage: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_stage("rm")
    manifest = json.loads((folder / "alignkit.json").read_text())

    assert folder == tmp_path / "runs" / "rm"
    assert manifest["steps"] == 2
    assert manifest["data"]["source"].endswith("rankings.jsonl")
    assert Path(manifest["parents"]["policy"]["folder"]) == tmp_path / "runs" / "sft"


def test_run_stage_takes_the_arguments_of_train(
    run_stage: Callable[..., Path], tiny_data: Callable[[str], Path], tmp_path: Path
) -> None:
    output = str(tmp_path / "else")
    folder = run_stage("sft", "--plugin", "full", "--output", output, "--data", str(tiny_data("text")))
    manifest = json.loads((folder / "alignkit.json").read_text())

    assert folder == tmp_path / "else" / "sft"
    assert (manifest["tuner"], manifest["data"]["format"]) == ("full", "text")


def test_run_stage_fails_with_the_one_line_of_the_error(run_stage: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match=r"^alignkit: error: unknown key tuner.rr. Did you mean 'r'\?"):
        run_stage("sft", "tuner.rr=3")
    with pytest.raises(AssertionError, match="no plugin named 'nonsense' is installed"):
        run_stage("nonsense")


def test_importing_the_fixtures_imports_nothing_heavy() -> None:
    code = "import sys, alignkit.testing; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_example_of_the_page_is_a_test_that_passes(run_stage: Callable[..., Path]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "testing.md").read_text(), re.S)
    scope: dict[str, Any] = {}
    exec(code, scope)

    scope["test_an_unknown_setting_is_an_error"](run_stage)


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_data", "run_stage", "check_plugin"])
def test_every_fixture_stands_in_the_docs(fixture: str, request: pytest.FixtureRequest) -> None:
    assert callable(request.getfixturevalue(fixture))
    assert f"| `{fixture}` |" in (DOCS / "testing.md").read_text()
