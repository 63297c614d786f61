"""The model card: results in the hub's format, the lineage, licenses, curves, and code that runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from run_folders import record

from alignkit.runs import card, card_results, licenses


def run_code(folder: Path) -> dict[str, Any]:
    """The names that the card's code defines."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), names)
    return names


@pytest.mark.draws_curves
def test_the_card_of_a_run_and_of_the_run_that_starts_from_it(
    train: Callable[..., Path], train_dpo: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    sft = train("--plugin", "full", "train.max_steps=2", output="sft")
    dpo = train_dpo("--plugin", "lora", f"dpo.policy={sft}", "train.max_steps=2")
    manifest, parent = record(dpo), record(sft)
    hub = ModelCard.load(dpo / "README.md")

    # the results
    results = {result.metric_type: result for result in hub.data.eval_results}
    held_out = {name for name in manifest["metrics"] if name.startswith("eval_") and not name.endswith("_error")}
    assert {f"eval_{name}" for name in results} == held_out
    value, error = (float(part) for part in results["accuracy"].metric_value.split(" ± "))
    assert value == pytest.approx(manifest["metrics"]["eval_accuracy"], abs=error / 10)
    assert error == pytest.approx(manifest["metrics"]["eval_accuracy_error"], rel=0.05)
    assert results["loss"].metric_value == pytest.approx(manifest["metrics"]["eval_loss"], rel=1e-3)
    assert results["loss"].dataset_name == f"4 held-out rows of {manifest['data']['source']}"
    assert results["loss"].dataset_type == "rankings.jsonl"
    assert hub.data.library_name == "peft"
    assert "license" not in hub.data.to_dict()
    for name, located in (("base", "/models/base"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B")):
        other = ModelCard(
            card.render({**manifest, "base": {**manifest["base"], "name": name, "located": located}}, dpo)
        )
        assert other.data.base_model == (name if name == located else None)  # the name of a folder is no id of the hub
    assert f"| loss | {manifest['metrics']['first_eval_loss']:.4g} |" in hub.text

    # the picture is beside the card
    assert "](curves.png)" in hub.text
    assert (dpo / "curves.png").exists()

    # what was trained from what
    for fingerprint in (
        manifest["fingerprints"]["weights"],
        manifest["data"]["fingerprint"],
        parent["fingerprints"]["weights"],
        parent["data"]["fingerprint"],
        parent["model"]["weights"],
    ):
        assert f"`{fingerprint[:12]}`" in hub.text
    assert f"| `{sft}` | sft with full | `{tiny_model()}` |" in hub.text
    assert "alignkit | 0" in hub.text

    # the code
    for folder in (sft, dpo):
        names = run_code(folder)
        assert isinstance(names["answer"], str)
        assert torch.isfinite(names["model"](**names["prompt"]).logits).all()

    # a parent whose folder is gone or was trained again is named, with the weights that it had
    shutil.move(sft, sft.with_name("moved"))
    assert f"| `{sft}` | unknown: its folder is gone |  |  | `{parent['fingerprints']['weights'][:12]}` |" in (
        card.render(manifest, dpo)
    )
    train("--plugin", "full", "train.max_steps=1", output="sft")
    assert f"| `{sft}` | unknown: trained again since |" in card.render(manifest, dpo)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.52341, 0.0312, "0.523 ± 0.031"),
        (12.3456, 2.71, "12.3 ± 2.7"),
        (1234.5, 99.6, "1234 ± 100"),
        (0.5, 0.0, "0.5"),
        (0.123456, None, "0.1235"),
        (3.0, float("nan"), "3"),
        (float("nan"), 0.1, "not finite"),
        (None, 0.1, "not finite"),
    ],
)
def test_a_result_has_the_digits_that_its_error_allows(value: float, error: float, shown: str) -> None:
    (result,) = card_results.of({"eval_score": value, "eval_score_error": error, "train_loss": 1.0})

    assert result == ("score", "", shown)


def test_licenses_are_those_that_cards_state(tmp_path: Path) -> None:
    for name, metadata in {
        "plain": "license: mit\n",
        "named": "license: other\nlicense_name: llama3\n",
        "several": "license: [mit, apache-2.0]\n",
        "none": "language: en\n",
        "broken": "license: [\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{metadata}---\n# Data\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")

    known = {"plain": "mit", "named": "llama3", "several": "mit, apache-2.0"}
    for name in ("plain", "named", "several", "none", "broken", "nothing", "rows.jsonl"):
        assert licenses.of_data(str(tmp_path / name)) == known.get(name), name
        assert licenses.of_model(name, tmp_path / name) == known.get(name), name
    assert licenses.of_data("bundled:rankings") == "apache-2.0"
    assert licenses.of_data("nobody/not-in-the-cache") is None


def test_a_run_has_the_license_of_its_base_model(
    train: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    licensed = tmp_path / "licensed"
    shutil.copytree(tiny_model(), licensed)
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n")
    run = train("--plugin", "full", "--model", str(licensed), "train.max_steps=1")

    assert json.loads((run / "alignkit.json").read_text())["base"]["license"] == "mit"
    assert licenses.of_model(str(licensed), run) == "mit"  # what starts from it
    text = (run / "README.md").read_text()
    assert f"| base model | `{licensed}` | mit |" in text
    assert "| unknown |" in text  # of the data
