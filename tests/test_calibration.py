"""``alignkit plan --time``: what is measured, and how it is extrapolated to the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.cli import common, main
from alignkit.planning import calibration
from alignkit.planning.calibration import Measured
from alignkit.runs.plan import pipeline

DATA = {"sft": "demonstrations", "dpo": "rankings", "rahf": "rankings", "ppo": "prompts"}
REWARD = ["reward.name=function", "reward.call=alignkit_fake_reward:score"]


@pytest.fixture
def words(
    tiny_model: Callable[..., Path], tiny_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    monkeypatch.syspath_prepend(str(tmp_path))
    Path(tmp_path, "alignkit_fake_reward.py").write_text(
        "def score(prompts, answers):\n    return [len(answer) / 9 for answer in answers]\n"
    )

    def make(stage: str, *more: str) -> list[str]:
        given = ["--plugin", stage, "--model", str(tiny_model("llama")), "--data", str(tiny_data(DATA[stage]))]
        given += ["--output", str(tmp_path / "out"), "data.eval_size=4", "train.use_cpu=true"]
        base = [] if stage == "sft" else [f"{stage}.policy=base"]
        return [*given, *base, *(REWARD if stage == "ppo" else []), *more]

    return make


def planned(words: list[str]) -> Any:
    plugin, model, data, output = words[1:8:2]
    return pipeline(*common.read_arguments([plugin], None, model, [data], output, words[8:])).to_train[0]


def test_microbatches_and_optimizer_steps_add_up_to_a_range() -> None:
    low, high = Measured([2.0, 3.0], [0.5, 0.5]).training(100, 25)

    assert low == pytest.approx(0.8 * (100 * 2 + 25 * 0.5))
    assert high == pytest.approx(1.25 * (100 * 3 + 25 * 0.5))


def test_the_steps_of_a_run_are_counted_as_the_trainer_counts_them(
    words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 rows in batches of 4 are 3 microbatches and 2 steps of 2; in 3 epochs 9 and 6. Evaluation at steps 0, 3, 6."""
    monkeypatch.setattr(calibration, "measure", lambda trainer: Measured([1.0], [0.0]))
    settings = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"]
    plan = planned(words("sft", *settings, "train.num_train_epochs=3"))
    parts = calibration.calibrate(plan, "cpu").parts

    assert len(plan.train_rows) == 12
    assert parts["training"] == (pytest.approx(0.8 * 9), pytest.approx(1.25 * 9))
    assert calibration.evaluations(plan, 6, 3) == 3
    assert parts["evaluation"] == (pytest.approx(3 * 0.25 * 0.8), pytest.approx(3 * 0.5 * 1.25))  # 4 rows, one batch
    longer = planned(words("sft", *settings, "train.max_steps=10"))
    assert calibration.calibrate(longer, "cpu").parts["training"] == (pytest.approx(16.0), pytest.approx(25.0))


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sft", []),
        ("dpo", ["dpo.response_length=4"]),
        ("rahf", ["rahf.response_length=4", "train.per_device_train_batch_size=2"]),
        ("ppo", ["ppo.batch_size=8", "ppo.minibatches=2", "ppo.response_length=6", "ppo.ptx_coef=0"]),
    ],
)
def test_every_part_of_a_run_is_measured_and_nothing_is_left_behind(
    stage: str, more: list[str], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    time = calibration.calibrate(planned(words(stage, *more)), "cpu")

    online = ("sampling", "scoring") if stage == "ppo" else ()
    assert list(time.parts) == ["loading", *online, "training", "evaluation"]
    assert all(0 < low <= high for low, high in time.parts.values())
    assert time.total == (
        pytest.approx(sum(low for low, _ in time.parts.values())),
        pytest.approx(sum(high for _, high in time.parts.values())),
    )
    assert not (tmp_path / "out").exists()


def test_an_online_run_is_extrapolated_from_its_iterations(
    words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight answers in microbatches of 2 and two epochs are 8 microbatches and 4 steps in each of 10 iterations."""
    from alignkit.online import calibration as online

    def measure(trainer: Any) -> Measured:
        trainer.metrics = {"seconds_scoring": 24.0}
        assert trainer.config.batch_size == 6
        return Measured([1.0], [0.5])

    monkeypatch.setattr(online, "measure", measure)
    monkeypatch.setattr(online, "decoding", lambda sample: (2.0, 0.5))
    settings = ["ppo.batch_size=8", "ppo.minibatches=2", "ppo.epochs=2", "ppo.response_length=6", "ppo.iterations=10"]
    plan = planned(words("ppo", *settings, "train.per_device_train_batch_size=2", "ppo.eval_every=5"))
    parts = calibration.calibrate(plan, "cpu").parts

    assert parts["sampling"] == (pytest.approx(10 * (2 + 3 * 0.5)), pytest.approx(10 * (2 + 6 * 0.5)))
    assert parts["scoring"][1] == pytest.approx(10 * 8 * 24 / 6)
    assert parts["training"][1] == pytest.approx(1.25 * (80 * 1 + 40 * 0.5))
    assert len(plan.eval_rows) == 4  # in each of 3 evaluations, half a batch: at most, they are sampled as slowly
    assert parts["evaluation"] == (
        pytest.approx(3 / 2 * (2 + 3 * 0.5 + parts["scoring"][0] / 10 / 2)),
        pytest.approx(3 * (2 + 6 * 0.5 + 8 * 24 / 6 / 2)),
    )


def test_there_is_no_time_for_another_device_or_after_a_run_that_is_not_trained(
    words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignkit import planning

    stub = SimpleNamespace(device="cuda", dtype="bfloat16", phases={"training": {"weights": 1}}, overhead=0, peak=1)
    monkeypatch.setattr(planning, "memory", lambda *args, **kwargs: stub)
    assert main(["plan", *words("sft"), "--time"]) == 0
    assert "time  not measured: the plan is for cuda, and a run on this machine would use cpu" in (
        capsys.readouterr().out
    )
    stub.device = "cpu"
    given = words("ppo")
    assert main(["plan", *[word for word in given if word != "ppo.policy=base"], "--time"]) == 0
    assert "out/sft, which is trained first" in capsys.readouterr().out
