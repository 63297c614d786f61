"""What could fail when a run is saved fails before it trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.training.saving import final_metrics

Train = Callable[..., Path]


@pytest.fixture
def with_generation_config(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``with_generation_config(temperature=0.9)``: the tiny model with these settings in its generation config."""

    def make(**settings: object) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_model(), folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **settings}))
        return folder

    return make


def test_a_temperature_without_do_sample_is_mended_and_the_run_can_be_saved(
    train: Train, with_generation_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GenerationConfig

    base = with_generation_config(temperature=0.9, top_p=0.6, max_length=4096, transformers_version="4.31.0")
    folder = train("--plugin", "full", "--model", str(base), "train.max_steps=1")

    saved = GenerationConfig.from_pretrained(folder)
    saved.validate(strict=True)
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    assert "has sampling settings without do_sample: it is saved with do_sample=true" in capsys.readouterr().out


def test_what_cannot_be_saved_stops_the_run_before_its_first_step(
    train: Train, with_generation_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_generation_config(num_beams=1, early_stopping=True)
    settings = ("--plugin", "full", "--model", str(base), "train.max_steps=1")

    with pytest.raises(AssertionError, match="is invalid and cannot be saved.*Correct its generation_config.json"):
        train(*settings)
    (base / "generation_config.json").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(AssertionError, match="has 0.0 GB free, and the trained weights need 0.0 GB: free some space"):
        train(*settings)
    assert not list((tmp_path / "out").rglob("*"))


def test_an_error_of_an_earlier_evaluation_does_not_stand_beside_the_last_score() -> None:
    """With one row that could be scored, there is no error."""
    logs = [
        {"step": 0, "eval_score": 1.0, "eval_score_error": 0.25, "eval_kl": 0.0},
        {"step": 2, "eval_score": 2.0, "eval_score_error": 0.5},
        {"step": 4, "eval_score": 3.0},
    ]
    arguments = SimpleNamespace(load_best_model_at_end=False)
    trainer: Any = SimpleNamespace(
        eval_dataset=[], args=arguments, state=SimpleNamespace(log_history=logs, global_step=4)
    )

    first = {"first_eval_score": 1.0, "first_eval_score_error": 0.25, "first_eval_kl": 0.0}
    assert final_metrics(trainer) == first | {"eval_score": 3.0, "eval_kl": 0.0}
