import json
import math

import pytest
import torch
from alignkit_my_thing import Config, build

from alignkit import TokenLogps


def test_the_loss_by_hand() -> None:
    logps, mask = torch.tensor([[math.log(0.5), math.log(0.1)]]), torch.tensor([[True, False]])
    loss = build(Config(gamma=1))(TokenLogps(logps, mask, num_tokens=1)).loss

    assert loss.item() == pytest.approx(0.5 * math.log(2))


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_sft_trains_with_it(run_stage) -> None:
    folder = run_stage("sft", "--plugin", "my-thing", "loss.gamma=1")

    assert json.loads((folder / "alignkit.json").read_text())["loss"] == "my-thing"
