"""What a row becomes, and that a file of such rows is recognized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from alignkit_dolly import convert

from alignkit import DataError

ROW = {"instruction": "Who wrote it?", "context": "Ada wrote it.", "response": "Ada did.", "category": "closed_qa"}


def test_the_context_follows_the_instruction() -> None:
    assert [m["content"] for m in convert(ROW).messages] == ["Who wrote it?\n\nAda wrote it.", "Ada did."]
    assert [m["content"] for m in convert({**ROW, "context": ""}).messages] == ["Who wrote it?", "Ada did."]


@pytest.mark.parametrize("response", ["", None, 3])
def test_a_bad_row_says_what_is_wrong(response: object) -> None:
    with pytest.raises(DataError, match="'response' must be text"):
        convert({**ROW, "response": response})


def test_a_context_that_is_a_list_is_refused() -> None:
    with pytest.raises(DataError, match="'context' must be text"):
        convert({**ROW, "context": ["a", "b"]})


def test_sft_recognizes_the_rows(run_stage: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "dolly.jsonl"
    file.write_text("".join(json.dumps({**ROW, "instruction": f"Who wrote {n}?"}) + "\n" for n in range(8)))
    run = run_stage("sft", "--plugin", "dolly", "--data", str(file), "data.format=null")

    assert json.loads((run / "alignkit.json").read_text())["data"]["format"] == "dolly"


def test_alignkit_finds_nothing_wrong_with_it(check_plugin: Callable[[str], None]) -> None:
    check_plugin("dolly")
