"""Which prompts ``alignkit compare`` asks, whatever the rows are that the runs were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from alignkit.data.prompts import has_prompt, has_tools, prompt_of
from alignkit.evaluation import comparison


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
