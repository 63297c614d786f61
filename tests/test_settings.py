"""Configs with paths and nested dataclasses: in `alignkit config`, in a run, its manifest, and a resumed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Lt

from alignkit import yaml
from alignkit.cli import main
from alignkit.config.settings import type_text

LOSS = """
    from dataclasses import dataclass, field
    from pathlib import Path
    from alignkit import Loss, LossOutput, TokenLogps, hookimpl, option

    @dataclass(frozen=True)
    class Schedule:
        start: float = option(1.0, "weight at first")
        cut: tuple[int, ...] = (3, 4)

    @dataclass(frozen=True)
    class Config:
        table: Path | None = option(None, "a file of weights")
        schedule: Schedule = field(default_factory=Schedule, metadata={"help": "how the weight falls"})

    def build(config):
        assert config.table is None or isinstance(config.table, Path)
        assert isinstance(config.schedule, Schedule)
        return lambda batch: LossOutput(-config.schedule.start * (batch.logps * batch.mask).sum() / batch.num_tokens)

    @hookimpl
    def alignkit_loss():
        return [Loss(name="weighted", summary="for a test", batch=TokenLogps, config=Config, build=build)]
"""
SAID = {"name": "weighted", "table": "some/weights.json", "schedule": {"start": 0.5, "cut": [3, 4]}}
SETTINGS = ["loss.table=some/weights.json", "loss.schedule.start=0.5"]


def test_paths_and_nested_dataclasses_are_settings_like_others(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], check_plugin: Callable[[str], None]
) -> None:
    install("weighted", LOSS)
    command = ["config", "--plugin", "sft", "--plugin", "weighted"]

    check_plugin("weighted")
    capsys.readouterr()
    assert main([*command, *SETTINGS]) == 0
    written = capsys.readouterr().out
    assert yaml.loads(written, "")["stages"]["sft"]["loss"] == SAID
    assert "      schedule:  # how the weight falls\n        start: 0.5  # weight at first\n" in written
    for wrong, told in (
        ("loss.schedule.strt=1", "unknown key loss.schedule.strt. Did you mean 'start'? Valid keys: cut, start"),
        ("loss.schedule.start=fast", "loss.schedule.start: Input should be a valid number"),
        ("loss.table=3", "loss.table: Input is not a valid path"),
    ):
        assert main([*command, wrong]) == 2
        assert capsys.readouterr().err.startswith(f"alignkit: error: {told}")


def test_a_run_with_such_settings_is_reproduced_and_goes_on(
    run_stage: Callable[..., Path], install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("weighted", LOSS)
    asked = ["--plugin", "weighted", "--plugin", "full", *SETTINGS, "train.save_steps=1"]
    folder = run_stage("sft", *asked)
    manifest = json.loads((folder / "alignkit.json").read_text())
    assert manifest["config"]["stages"]["sft"]["loss"] == SAID

    run_stage("sft", *asked)
    assert "nothing to train: a finished run with these settings exists" in capsys.readouterr().out
    (folder / "alignkit.json").unlink()
    folder.rename(folder.with_name("sft.unfinished"))
    with pytest.raises(AssertionError, match="loss.schedule.start was 0.5, is 0.25"):
        run_stage("sft", *asked, "loss.schedule.start=0.25", "--resume")
    run_stage("sft", *asked, "--resume")
    assert "resuming from step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Annotated[float, Ge(0), Lt(1)], "float >= 0 and < 1"),
        (Annotated[int, Gt(0)] | None, "int > 0 | null"),
        (Literal["error", "skip"], "error | skip"),
        (dict[str, list[int]], "dict[str, list[int]]"),
        (Path, "Path"),
    ],
)
def test_types_are_written_for_people(hint: object, text: str) -> None:
    assert type_text(hint) == text
