"""Rows of the reward model: ties, long answers, every format of preferences, and what a run of few rows says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import record
from stage_runs import RANKINGS

from alignkit import Ranking
from alignkit_rm import groups, metrics


def test_rankings_that_are_all_ties_are_left_out_and_counted(
    train_rm: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tied = {"prompt": "Tie?", "responses": ["a", "b"], "ranks": [1, 1]}
    train_rm("train.max_steps=1", rows=[*RANKINGS, tied, tied])

    assert "rankings: all answers are tied" in capsys.readouterr().out


def test_an_answer_that_is_too_long_is_an_error_or_skipped(
    train_rm: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*RANKINGS, {"prompt": "Long?", "responses": ["a", "b", "long " * 90], "ranks": [0, 1, 2]}]
    with pytest.raises(AssertionError):
        train_rm("rm.max_length=80", "train.max_steps=1", "data.eval_size=0", rows=rows)
    assert re.search(r"error: 1 of \d+ answers are over 80 tokens", capsys.readouterr().err)
    train_rm("rm.max_length=80", "rm.too_long=skip", "train.max_steps=1", "data.eval_size=0", "--overwrite", rows=rows)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": f"p{n}", "chosen": "good answer", "rejected": "bad"} for n in range(8)],
        [{"prompt": f"p{n}", "chosen": "good answer", "rejected": "bad", "margin": n} for n in range(8)],
        [
            {"chosen": f"\n\nHuman: p{n}\n\nAssistant: a", "rejected": f"\n\nHuman: p{n}\n\nAssistant: b"}
            for n in range(8)
        ],
        [
            {
                "conversations": [{"from": "human", "value": f"p{n}"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
            for n in range(8)
        ],
        [{"prompt": f"p{n}", "responses": list("abcdefghi"), "ranks": [*range(8), None]} for n in range(8)],
    ],
    ids=["preference", "margins", "hh-rlhf", "sharegpt", "ranking"],
)
def test_every_format_of_preferences_trains(train_rm: Callable[..., Path], rows: Any) -> None:
    assert record(train_rm("train.max_steps=1", "data.eval_size=2", rows=rows))["steps"] == 1


def test_bloom_which_takes_no_mask_of_ours_is_trained_without(
    train_rm: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {n}. " * 9, "responses": [f"good {n}", f"bad {n}"], "ranks": [0, 1]} for n in range(16)]
    train_rm("--plugin", "full", "train.max_steps=1", model="bloom", rows=rows)

    assert "shared prompt" not in capsys.readouterr().out


def test_one_held_out_prompt_leaves_usability_unknown_and_valid_json(train_rm: Callable[..., Path]) -> None:
    folder = train_rm("--plugin", "lora", "train.max_steps=1", "data.eval_size=1")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for text in [(folder / "alignkit.json").read_text(), *(folder / "metrics.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=refuse)
    assert record(folder)["verdict"].startswith("usability for PPO is unknown")


def test_rows_of_one_prompt_are_one_prompt_in_the_error() -> None:
    scores, ranks, lengths = np.array([[1.0, 0.0], [0.0, 1.0]] * 2), np.array([[0, 1]] * 4), np.ones((4, 2))

    assert metrics.evaluate(scores, ranks, lengths)["accuracy_error"] == pytest.approx(
        math.sqrt(4 * 0.5**2 * 4 / 3) / 4
    )
    together = metrics.evaluate(scores, ranks, lengths, prompts=[0, 1, 0, 1])
    assert together["accuracy_error"] == pytest.approx(math.sqrt(2 * 1**2 * 2 / 1) / 4)


def test_demonstrations_that_all_score_the_same_cannot_be_the_measure(
    train_rm: Callable[..., Path], train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps({"prompt": "Hi", "response": "Hello"}) + "\n")
    sft = train("--plugin", "full", "--data", str(same), "data.eval_size=0", "train.max_steps=1", output="sft")

    with pytest.raises(AssertionError):
        train_rm("--plugin", "full", f"rm.policy={sft}", "train.max_steps=1")
    assert "cannot be normalized: it is the same for all 1 demonstrations" in capsys.readouterr().err


def test_prompts_whose_texts_join_to_the_same_text_are_different_prompts() -> None:
    """A system turn, and the same words in the question: each answer stays with the prompt that it answered."""
    with_system = Ranking(
        [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}], ["a", "b"], [0, 1]
    )
    in_question = Ranking([{"role": "user", "content": "Be kind\nHi"}], ["a", "c"], [0, 1])

    assert with_system.key == in_question.key
    assert groups.merge_pairs([with_system, in_question]) == [with_system, in_question]
