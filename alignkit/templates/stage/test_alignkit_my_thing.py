import json

import pytest


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_it_learns(run_stage, tuner) -> None:
    folder = run_stage("my-thing", "--plugin", tuner, "train.max_steps=4", "train.learning_rate=0.01")
    metrics = json.loads((folder / "alignkit.json").read_text())["metrics"]

    assert metrics["eval_loss"] < metrics["first_eval_loss"]


def test_the_loss_is_the_loss_of_sft(run_stage) -> None:
    folders = [run_stage(stage, "--plugin", "full") for stage in ("my-thing", "sft")]
    losses = [json.loads((folder / "alignkit.json").read_text())["metrics"]["first_eval_loss"] for folder in folders]

    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # sft's is a mean over tokens, this one over batches
