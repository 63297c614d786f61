"""``--overwrite`` replaces the requested run alone, and never what a run is made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMONSTRATIONS

import alignkit
from alignkit.cli import main


def test_a_run_does_not_replace_what_it_is_made_from(
    train_dpo: Callable[..., Path], dpo_command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_dpo("--plugin", "full", "train.max_steps=1")
    adapter = train_dpo("--plugin", "lora", f"dpo.policy={run}", "train.max_steps=1", output="second")
    rows = Path(shutil.copy(run.parents[1] / "rankings.jsonl", run / "rows.jsonl"))
    inside = run.with_name("dpo.unfinished") / "checkpoint-1"
    shutil.copytree(run, inside)

    for settings, used in (
        ([f"dpo.policy={run}"], run),
        ([f"dpo.policy={adapter}"], f"{run} (the base of {adapter})"),
        (["--model", str(run)], run),
        (["--model", str(inside)], inside),
        ([f"data.eval_path={rows}"], rows),
    ):
        for more in ([], ["--overwrite"]):
            assert main(["train", *dpo_command(*settings, *more)]) == 2
            said = capsys.readouterr().err
            assert f"dpo uses {used}, which this run would replace. Choose another --output" in said
    assert main(["train", "--plan", "--overwrite", *dpo_command(f"dpo.policy={run}", output="third")]) == 0


def test_an_unfinished_run_of_an_earlier_stage_stays(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("runs/sft.unfinished/checkpoints/checkpoint-1")
    checkpoint.mkdir(parents=True)
    rankings = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(8)]
    tables = {"sft": {"data": DEMONSTRATIONS}, "model": tiny_model(), "data": rankings}

    with pytest.raises(alignkit.AlignkitError, match="runs/sft has an unfinished run"):
        alignkit.train("dpo", overwrite=True, **tables)
    assert checkpoint.exists()
