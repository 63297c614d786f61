import json

import torch


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_sft_trains_with_its_settings(run_stage) -> None:
    folder = run_stage("sft", "--plugin", "my-thing", "optimizer.momentum=0.5", "train.learning_rate=0.1")
    manifest = json.loads((folder / "alignkit.json").read_text())
    (checkpoint, *_) = (folder / "checkpoints").glob("checkpoint-*")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)

    assert manifest["config"]["optimizer"]["name"] == "my-thing"
    assert {group["momentum"] for group in state["param_groups"]} == {0.5}
