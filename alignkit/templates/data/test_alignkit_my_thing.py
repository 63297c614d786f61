import json

import pytest
from alignkit_my_thing import convert

from alignkit import DataError

ROWS = [{"question": f"What is {n} and one?", "best_answer": f"It is {n + 1}."} for n in range(16)]


def test_a_row_is_a_demonstration() -> None:
    assert convert(ROWS[1]).messages[1] == {"role": "assistant", "content": "It is 2."}


def test_a_row_without_an_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="'best_answer' is missing or not text"):
        convert({"question": "Why?"})


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_sft_trains_on_its_rows(run_stage, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = run_stage("sft", "--plugin", "my-thing", "--data", str(file))

    assert json.loads((folder / "alignkit.json").read_text())["data"]["format"] == "my-thing"
