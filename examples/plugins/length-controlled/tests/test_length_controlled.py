"""What is taken off, by hand, and from which reward."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from alignkit_length_controlled import LengthConfig, alignkit_reward, build, without_length

from alignkit import Answers, ConfigError, PluginError
from alignkit.config import reward_parts
from alignkit.config.settings import Selected
from alignkit.registry import Registry


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


def test_reward_models_inside_are_found_by_alignkit() -> None:
    """At any depth; a part that names no run takes the path of the reward that it is in."""
    looked_for = []
    parts = [{"name": "reward-model", "weight": 2, "path": "a"}, {"name": "reward-model"}]
    of = {"name": "sum", "parts": parts}

    def find(stage: str, role: str, named: str | None, key: str) -> str:
        looked_for.append((stage, named, key))
        return named or "found"

    reward = Selected(alignkit_reward()[0], LengthConfig(of=of, path="b"))
    found = reward_parts.with_runs(Registry(), reward, find).config

    assert looked_for == [("rm", "a", "reward.of.parts[0].path"), ("rm", "b", "reward.of.parts[1].path")]
    assert [part["path"] for part in found.of["parts"]] == ["a", "b"]


def test_the_scores_are_those_of_the_reward_inside_without_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that counts tokens and nothing else gives one score to all."""
    (tmp_path / "counting.py").write_text(
        "def words(prompts, answers):\n    return [len(a.split()) for a in answers]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = LengthConfig(of={"name": "function", "call": "counting:words"}, scale="linear", fewest=4)
    score = build(config, SimpleNamespace(registry=Registry()))
    prompt = [{"role": "user", "content": "Count."}]
    answers = Answers([prompt] * 4, ["a " * n for n in (1, 2, 3, 6)], [[5]] * 4, [[7] * n for n in (1, 2, 3, 6)])

    assert score(answers) == pytest.approx([3.0] * 4)


def test_a_reward_inside_has_to_be_there() -> None:
    run = SimpleNamespace(registry=Registry())

    with pytest.raises(ConfigError, match="must name a reward"):
        build(LengthConfig(of={"call": "a:b"}), run)
    with pytest.raises(PluginError, match="Did you mean 'reward-model'"):
        build(LengthConfig(of={"name": "reward-modle"}), run)


def test_alignkit_finds_nothing_wrong_with_it(check_plugin: Callable[[str], None]) -> None:
    check_plugin("length-controlled")
