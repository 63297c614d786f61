"""What a resume may change, training on from a finished run, and what must not change what is trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Train = Callable[..., Path]

STEPS = ("train.save_steps=2", "train.logging_steps=1", "tuner.lora_dropout=0.1", "train.report_to=none")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def logged(folder: Path, name: str) -> list[int]:
    """The steps at which something was logged."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if name in line]


def manifest(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "alignkit.json").read_text())
    return record


def test_evaluation_does_not_change_what_is_trained(train: Train) -> None:
    often = train("train.max_steps=4", "train.eval_steps=1", "train.eval_strategy=steps", *STEPS)
    never = train("train.max_steps=4", "train.eval_strategy=no", *STEPS, output="never")

    assert logged(often, "eval_loss") == [0, 1, 2, 3, 4]
    assert_same_weights(often, never)


# --- settings that a resume may change -------------------------------------------------------------------------------

CRASH = """
    import os
    from alignkit import hookimpl

    @hookimpl
    def alignkit_callbacks(run):
        from transformers import TrainerCallback

        class Crash(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == int(os.environ.get("CRASH_AT", -1)):
                    raise RuntimeError("out of memory")

        return [Crash()]
"""


@pytest.fixture
def crash_at(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``crash_at(3)``: a run with ``--plugin crash`` fails in its fourth step; ``crash_at(-1)``: it does not."""
    install("crash", CRASH)
    return lambda step: monkeypatch.setenv("CRASH_AT", str(step))


def test_a_resume_may_change_how_often_it_evaluates_and_saves(train: Train, crash_at: Callable[[int], None]) -> None:
    settings = ("--plugin", "crash", "train.max_steps=6", "train.save_total_limit=9", *STEPS)
    crash_at(-1)
    whole = train(*settings, "train.eval_steps=6", output="whole")
    crash_at(3)
    with pytest.raises(AssertionError, match="out of memory"):
        train(*settings, "train.eval_steps=6")
    crash_at(-1)
    resumed = train(*settings, "train.eval_steps=3", "train.save_steps=3", "train.logging_steps=2", "--resume")

    assert logged(resumed, "eval_loss") == [0, 3, 6]
    assert logged(resumed, "loss") == [1, 2, 4, 6]
    assert {path.name for path in resumed.glob("checkpoints/checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 3, 6)}
    assert_same_weights(whole, resumed)


ADDRESS = """
    from dataclasses import dataclass
    from alignkit import Reward, hookimpl, option

    @dataclass(frozen=True)
    class Config:
        address: str = option("http://a", "where it runs", resume="may_change")
        scale: float = option(1.0, "what scores are multiplied by")

    def build(config, run):
        run.say(f"asking {config.address}")
        return lambda answers: [config.scale * len(text) / 10 for text in answers.texts]

    @hookimpl
    def alignkit_reward():
        return [Reward(name="remote", summary="by length", config=Config, build=build)]
"""
PPO = ("--plugin", "remote", "ppo.policy=base", "ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=6")
PPO += ("train.max_steps=-1", "train.learning_rate=0.01", "ppo.save_every=2", "ppo.keep=last")


def test_ppo_trains_on_from_a_finished_run_as_if_it_had_been_longer(
    run_stage: Callable[..., Path],
    install: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("remote", ADDRESS)
    whole = run_stage("ppo", *PPO, "ppo.iterations=4", "--output", str(tmp_path / "whole"))
    part = run_stage("ppo", *PPO, "ppo.iterations=2")
    first = weights(part)
    capsys.readouterr()

    with pytest.raises(AssertionError, match="add --resume to extend it"):
        run_stage("ppo", *PPO, "ppo.iterations=4")
    assert run_stage("ppo", *PPO, "ppo.iterations=2", "reward.address=http://b") == part
    assert "nothing to train" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="these differ: ppo.reward.scale was 1.0, is 2.0"):
        run_stage("ppo", *PPO, "ppo.iterations=4", "reward.scale=2", "--resume")
    with pytest.raises(AssertionError, match="these differ: ppo.iterations was 2, is 1"):
        run_stage("ppo", *PPO, "ppo.iterations=1", "--resume")
    run_stage("ppo", *PPO, "ppo.iterations=4", "reward.address=http://b", "--resume")

    said = capsys.readouterr().out
    assert "resuming from step 4" in said
    assert "asking http://b" in said
    assert any(not torch.equal(tensor, first[name]) for name, tensor in weights(part).items())
    assert_same_weights(whole, part)
    assert_same_weights(whole / "checkpoints" / "checkpoint-8", part / "checkpoints" / "checkpoint-8")  # the value too
    assert logged(part, "kl") == logged(whole, "kl") == [2, 4, 6, 8]
    assert manifest(part)["steps"] == 8
    assert manifest(part)["longer"] == [{"step": 4, "settings": ["ppo.iterations was 2, is 4"]}]


def test_a_reward_model_trains_on_from_its_head_as_it_was_before_its_scores_were_normalized(
    run_stage: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ("rm.policy=base", "train.lr_scheduler_type=constant", "train.learning_rate=0.01", *STEPS)
    whole = run_stage("rm", *settings, "train.max_steps=4", "--output", str(tmp_path / "whole"))
    part = run_stage("rm", *settings, "train.max_steps=2")

    assert run_stage("rm", *settings, "train.max_steps=4", "--resume") == part
    assert_same_weights(whole, part)


def test_a_schedule_of_the_longer_run_holds_from_there_on_and_that_is_said(
    train: Train, crash_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--plugin", "crash", "train.lr_scheduler_type=linear", "train.learning_rate=0.8", *STEPS)
    crash_at(-1)
    folder = train(*settings, "train.max_steps=4")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    crash_at(6)
    with pytest.raises(AssertionError, match="out of memory"):
        train(*settings, "train.max_steps=8", "--resume")

    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert (folder / "checkpoints" / "checkpoint-4" / "optimizer.pt").exists()
    assert "from now on, it follows the linear schedule of the longer run" in capsys.readouterr().out
    crash_at(-1)
    train(*settings, "train.max_steps=8", "--resume")

    assert "resuming from step 6" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    # a step is logged with the rate that it was made with: 0.8 (1 - (step - 1) / 4), then 0.8 (1 - (step - 1) / 8)
    assert rates == pytest.approx({1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2, 5: 0.4, 6: 0.3, 7: 0.2, 8: 0.1})
    assert manifest(folder)["longer"] == [{"step": 4, "settings": ["sft.train.max_steps was 4, is 8"]}]


def test_a_finished_run_without_a_checkpoint_cannot_be_trained_on(train: Train) -> None:
    train("train.max_steps=1", "train.save_strategy=no")

    with pytest.raises(AssertionError, match=r"cannot extend .*: it keeps no checkpoint \(train.save_strategy: no"):
        train("train.max_steps=2", "train.save_strategy=no", "--resume")


def test_where_the_best_evaluation_is_kept_it_may_not_change(train: Train, crash_at: Callable[[int], None]) -> None:
    settings = ("--plugin", "crash", "train.max_steps=4", "train.load_best_model_at_end=true", *STEPS)
    crash_at(3)
    with pytest.raises(AssertionError, match="out of memory"):
        train(*settings, "train.eval_steps=2")

    with pytest.raises(AssertionError, match="these differ: sft.train.eval_steps was 2.0, is 1.0"):
        train(*settings, "train.eval_steps=1", "--resume")


LINEAR = ("--plugin", "crash", "--plugin", "full", "train.lr_scheduler_type=constant", "train.learning_rate=0.1")
LINEAR += (
    "train.adam_epsilon=1",
    "train.bf16=false",
)  # so large that a step is nearly linear in the gradient, and so is its rounding


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_out_of_memory_goes_on_with_smaller_forwards_and_the_same_steps(
    stage: str,
    run_stage: Callable[..., Path],
    install: Callable[..., None],
    crash_at: Callable[[int], None],
    tmp_path: Path,
) -> None:
    install("remote", ADDRESS)
    settings = (*LINEAR, "train.max_steps=3", "train.save_steps=1")
    smaller = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    if stage == "ppo":
        settings = (*LINEAR, *PPO, "ppo.minibatches=1", "ppo.iterations=3", "ppo.save_every=1", "train.learning_rate=1")
        smaller = ["train.per_device_train_batch_size=2"]
    larger = "train.per_device_train_batch_size=4"
    crash_at(-1)
    whole = run_stage(stage, *settings, larger, "--output", str(tmp_path / "whole"))
    crash_at(2)
    with pytest.raises(AssertionError, match="out of memory"):
        run_stage(stage, *settings, larger)
    crash_at(-1)
    if stage == "sft":
        with pytest.raises(AssertionError, match="sft.train.per_device_train_batch_size was 4, is 2"):
            run_stage(stage, *settings, smaller[0], "--resume")

    assert run_stage(stage, *settings, *smaller, "--resume").exists()
    torch.testing.assert_close(weights(tmp_path / "runs" / stage), weights(whole), rtol=1e-4, atol=1e-6)


# --- when a run fails, and two of them at once -----------------------------------------------------------------------


def test_run_failed_is_called_and_its_own_failure_does_not_hide_the_first(
    train: Train, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "herald",
        """
        import os
        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_start(run):
            if "start" in os.environ["FAILS"]:
                raise RuntimeError("no connection")

        @hookimpl
        def alignkit_run_failed(run, error):
            if "failed" in os.environ["FAILS"]:
                raise RuntimeError("no connection either")
            print("told of", run.config.stage.component.name, type(error).__name__, error, run.folder.exists())
        """,
    )
    monkeypatch.setenv("FAILS", "start")
    with pytest.raises(AssertionError, match="failed in alignkit_run_start: RuntimeError: no connection"):
        train("--plugin", "herald", "train.max_steps=1")
    told = capsys.readouterr().out
    assert "told of sft PluginError plugin herald (alignkit-herald 0.1) failed in alignkit_run_start" in told
    assert told.strip().endswith("True")

    monkeypatch.setenv("FAILS", "start, failed")
    with pytest.raises(AssertionError, match="failed in alignkit_run_start: RuntimeError: no connection. "):
        train("--plugin", "herald", "train.max_steps=1")  # no --resume is needed: nothing was left behind
    assert "failed in alignkit_run_failed: RuntimeError: no connection either" in capsys.readouterr().out


def test_run_failed_is_called_for_every_plugin_though_one_of_them_raises(
    train: Train, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        install(
            name,
            f"""
            from alignkit import hookimpl

            @hookimpl
            def alignkit_run_start(run):
                raise ValueError("stop")

            @hookimpl
            def alignkit_run_failed(run, error):
                raise RuntimeError("{name} was told")
            """,
        )
    with pytest.raises(AssertionError, match="failed in alignkit_run_start: ValueError: stop"):
        train("--plugin", "first", "--plugin", "second", "train.max_steps=1")
    said = capsys.readouterr().out
    assert "first was told" in said
    assert "second was told" in said


def test_a_model_folder_that_is_gone_after_the_plan_is_one_line(
    train: Train, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import alignkit.training.execution as module

    model, execute = shutil.copytree(tiny_model(), tmp_path / "model"), module.execute

    def without_its_model(*arguments: Any, **keywords: Any) -> Any:
        shutil.rmtree(model)
        return execute(*arguments, **keywords)

    monkeypatch.setattr(module, "execute", without_its_model)
    with pytest.raises(AssertionError, match=f"error: no model folder {model}$"):
        train("--model", str(model), "train.max_steps=1")


def test_metrics_of_numpy_and_torch_are_written_as_plain_numbers(tmp_path: Path) -> None:
    import numpy

    from alignkit.runs.manifest import write_json

    metrics = {
        "a": numpy.float32(0.5),
        "b": torch.tensor(3),
        "c": numpy.array([1.0, numpy.nan]),
        "d": numpy.float64("inf"),
    }
    write_json(tmp_path / "m.json", metrics)
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 0.5, "b": 3, "c": [1.0, None], "d": None}


def test_a_second_process_in_a_folder_is_refused_and_a_killed_one_leaves_no_lock(train: Train, tmp_path: Path) -> None:
    from alignkit.runs import lock

    folder = tmp_path / "out" / "sft.unfinished"
    code = f"import pathlib, alignkit.runs.lock as lock\nwith lock.held(pathlib.Path({str(folder)!r})): print(input())"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    hidden = folder.with_name(".sft.unfinished.lock")
    while not (hidden.exists() and hidden.read_text()):
        assert other.poll() is None
        time.sleep(0.01)

    for flag in ("--resume", "--overwrite"):
        with pytest.raises(AssertionError, match=rf"another process \(pid {other.pid}\) is training in {folder}. Wait"):
            train("train.max_steps=1", flag)
    other.kill()
    other.communicate()
    assert hidden.exists()
    with lock.held(folder):
        pass
    assert not hidden.exists()
