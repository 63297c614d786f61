"""Which prompts ``alignkit compare`` asks, whatever the rows are that the runs were trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.cli import main
from alignkit.data.prompts import has_prompt, has_tools, prompt_of
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation import comparison
from alignkit.rows import Located, Prompt
from alignkit.runs.lineage import Parent


def row(text: str) -> Located:
    return Located("rows.jsonl line 1", Prompt([{"role": "user", "content": text}]))


def test_runs_on_texts_have_no_prompts_and_are_compared_on_those_of_others(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"It rained for {n} days."}) + "\n" for n in range(6)))
    short = ("train.max_steps=1", "data.eval_size=2")
    on_texts = train(*short, f"data.path={texts}", output="texts")
    on_answers = train(*short, output="answers")

    runs = comparison.runs_of([str(on_texts), str(on_answers)])
    for order in (runs, runs[::-1]):
        assert len(comparison.prompts_of(None, order, 10).prompts) == 2


def test_a_row_type_of_a_plugin_has_its_prompt() -> None:
    prompt = [{"role": "user", "content": "Why?"}]
    row = SimpleNamespace(prompt=prompt, answer="Because.")

    assert has_prompt(row)  # type: ignore[arg-type]
    assert not has_tools(row)  # type: ignore[arg-type]
    assert prompt_of(row) == prompt  # type: ignore[arg-type]
    assert not has_prompt(SimpleNamespace(text="It rained."))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ([], "no prompts that these runs held out are known: add --data"),
        (
            DataError("rows.jsonl has changed"),
            "known: add --data (runs/a: rows.jsonl has changed; runs/b: rows.jsonl",
        ),
        ([row("Why?")], "every prompt that one of these runs held out was trained on by another: add --data"),
    ],
)
def test_why_there_are_no_prompts(monkeypatch: pytest.MonkeyPatch, held_out: Any, message: str) -> None:
    def rows_of(record: Any) -> Any:
        if isinstance(held_out, DataError):
            raise held_out
        return held_out, held_out

    monkeypatch.setattr(comparison, "rows_of", rows_of)
    record = {"stage": "sft", "config": {"stages": {"sft": {"data": {}}}}}
    with pytest.raises(ConfigError, match=re.escape(message)):
        comparison.prompts_of(None, [Parent("sft", Path("runs") / name, record) for name in "ab"], 10)


def test_a_mistyped_folder_of_a_sweep_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "runs/kl_coef=0.1_seed=1/ppo", "runs/kl_coef=0.1_seed=9/ppo"]) == 2
    assert "runs/kl_coef=0.1_seed=1/ppo" in (error := capsys.readouterr().err)
    assert "has no effect" not in error
