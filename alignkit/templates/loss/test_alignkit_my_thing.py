import json
import math

import pytest
import torch
from alignkit_my_thing import Config, build

from alignkit import TokenLogps


def test_by_hand() -> None:
    logps, mask = torch.tensor([[math.log(0.5), math.log(0.1)]]), torch.tensor([[True, False]])
    loss = build(Config(gamma=1))(TokenLogps(logps, mask, num_tokens=1)).loss

    assert loss.item() == pytest.approx(0.5 * math.log(2))


def test_nothing_is_wrong_with_the_plugin(check_plugin) -> None:
    check_plugin("my-thing")


def test_it_trains(run_stage) -> None:
    folder = run_stage("sft", "--plugin", "my-thing", "loss.gamma=1")

    assert json.loads((folder / "alignkit.json").read_text())["loss"] == "my-thing"
