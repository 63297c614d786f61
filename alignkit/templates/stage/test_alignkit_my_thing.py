import json

import pytest


def test_nothing_is_wrong_with_the_plugin(check_plugin) -> None:
    check_plugin("my-thing")


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_it_learns(run_stage, tuner) -> None:
    folder = run_stage("my-thing", "--plugin", tuner, "train.max_steps=4", "train.learning_rate=0.01")
    metrics = json.loads((folder / "alignkit.json").read_text())["metrics"]

    assert metrics["eval_loss"] < metrics["first_eval_loss"]


def test_the_loss_is_that_of_sft(run_stage) -> None:
    mine, theirs = run_stage("my-thing", "--plugin", "full"), run_stage("sft", "--plugin", "full")
    before = [json.loads((f / "alignkit.json").read_text())["metrics"]["first_eval_loss"] for f in (mine, theirs)]

    assert before[0] == pytest.approx(before[1], rel=0.05)  # a mean over batches, and one over tokens
