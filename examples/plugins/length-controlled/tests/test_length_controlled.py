"""What is taken off, by hand; and a run of PPO with it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from alignkit_length_controlled import LengthConfig, needs, without_length


def test_a_line_is_taken_off_and_the_mean_stays() -> None:
    config = LengthConfig(scale="linear", fewest=4)
    found = without_length([1.0, 2.0, 3.0, 6.0], [10, 20, 30, 40], config)  # slope 0.16, mean 3 at length 25

    assert found == pytest.approx([3.4, 2.8, 2.2, 3.6])
    assert statistics.correlation(found, [10, 20, 30, 40]) == pytest.approx(0, abs=1e-9)


def test_its_settings_act() -> None:
    scores, lengths = [math.log(n) for n in (2, 4, 8, 16)], [2, 4, 8, 16]
    half = LengthConfig(strength=0.5, fewest=4)
    middle = statistics.fmean(scores)

    assert without_length(scores, lengths, LengthConfig(fewest=4)) == pytest.approx([middle] * 4)
    assert without_length(scores, lengths, half) == pytest.approx([(s + middle) / 2 for s in scores])
    assert without_length(scores, lengths, LengthConfig(fewest=5)) == scores
    assert without_length(scores, [7] * 4, LengthConfig(fewest=4)) == scores


def test_a_reward_model_inside_is_looked_for() -> None:
    parts = [{"name": "reward-model", "weight": 2}, {"name": "function", "call": "a:b"}]

    assert needs(LengthConfig()) == {"reward": "rm"}
    assert needs(LengthConfig(of={"name": "sum", "parts": parts})) == {"reward": "rm"}
    assert needs(LengthConfig(of={"name": "function", "call": "a:b"})) == {}


def test_ppo_gets_the_scores_of_the_reward_inside_without_length(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that is the length in words and nothing else leaves nothing to learn; the metrics tell the mean alone."""
    (tmp_path / "rewards.py").write_text(
        "batches = []\n\ndef tokens(prompts, answers):\n    batches.append(len(answers))\n"
        "    return [float(len(answer)) for answer in answers]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["ppo.policy=base", "ppo.batch_size=16", "ppo.minibatches=2", "ppo.response_length=8"]
    run = run_stage("ppo", "--plugin", "length-controlled", "reward.of={name: function, call: rewards:tokens}", *small)
    import rewards

    assert 16 in rewards.batches
    assert json.loads((run / "alignkit.json").read_text())["config"]["stages"]["ppo"]["reward"]["strength"] == 1.0
