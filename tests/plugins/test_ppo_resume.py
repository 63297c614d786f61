"""Runs of PPO that are killed go on exactly, and two processes train what one trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from conftest import on_two_processes
from ppo_runs import GOLD, SMALL, iterations, ppo, trained

from alignkit.runs import read_answers


def test_a_run_that_had_only_to_be_finished_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its last checkpoint: no step more, and the same weights."""
    from alignkit.training import execution

    def killed(*arguments: Any) -> None:
        raise GeneratorExit  # which nothing handles

    settings = [*GOLD, "ppo.iterations=2", "ppo.ema=0.5"]
    whole = ppo(*settings, "--output", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(execution, "save", killed)
        with pytest.raises(GeneratorExit):
            ppo(*settings, "--output", "cut")
    assert Path("cut/ppo.unfinished/checkpoints/checkpoint-4").is_dir()
    resumed = ppo(*settings, "--resume", "--output", "cut")

    assert json.loads((resumed / "alignkit.json").read_text())["steps"] == 4
    assert all(torch.equal(t, trained(resumed)[n]) for n, t in trained(whole).items())
    assert (resumed / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_killed_and_resumed_is_bit_for_bit_the_same(folder: Path, tuner: str) -> None:
    settings = [*GOLD, "--plugin", tuner, "ppo.iterations=4", "ppo.ema=0.9", "ppo.kl_target=1", "ppo.epochs=2"]
    whole = ppo(*settings, "--output", "whole")
    cut = ppo(*settings, "--output", "cut")
    (cut / "alignkit.json").unlink()
    for checkpoint in (cut / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 12:
            shutil.rmtree(checkpoint)
    assert list((cut / "checkpoints").glob("checkpoint-12"))
    cut.rename(cut.with_name("ppo.unfinished"))
    resumed = ppo(*settings, "--resume", "--output", "cut")

    assert all(torch.equal(t, trained(resumed)[n]) for n, t in trained(whole).items())
    assert (resumed / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    timing = ("seconds", "per_second")
    for a, b in zip(iterations(whole), iterations(resumed), strict=True):
        assert {k: v for k, v in a.items() if not any(t in k for t in timing)} == {
            k: v for k, v in b.items() if not any(t in k for t in timing)
        }


@pytest.mark.parametrize("moment", ["scoring", "saving"])
def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(folder: Path, moment: str) -> None:
    """``kill -9`` in the middle of an iteration's rollouts, and (often) in the middle of writing a checkpoint."""
    Path("slow.py").write_text(
        "import os, pathlib, time, gold\n"
        "def letters(prompts, answers):\n"
        "    done = list(pathlib.Path('cut/ppo.unfinished/checkpoints').glob('checkpoint-*/trainer_state.json'))\n"
        "    if os.environ.get('SLOW') and len(done) > 1:\n"
        "        pathlib.Path('here').touch()\n"
        "        time.sleep(60)\n"
        "    return gold.letters(prompts, answers)\n"
    )
    settings = ["ppo.policy=base", "reward.name=function", "reward.call=slow:letters", "ppo.iterations=4"]
    whole = trained(ppo(*settings, "--output", "whole"))

    env = {**os.environ, "SLOW": "1" if moment == "scoring" else ""}
    checkpoints = Path("cut/ppo.unfinished/checkpoints")
    process = processes.Process("train", "--plugin", "ppo", *SMALL, *settings, "--output", "cut", env=env)
    while not (Path("here").exists() if moment == "scoring" else len(list(checkpoints.glob("checkpoint-*"))) > 1):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert not Path("cut/ppo").exists()
    resumed = trained(ppo(*settings, "--output", "cut", "--resume"))

    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_two_processes_sample_and_learn_what_one_does(folder: Path) -> None:
    """The answers of each iteration, their minibatches in each epoch, and so the weights, are those of one process."""
    settings = [*GOLD, "ppo.iterations=2", "ppo.epochs=2", "data.eval_size=3", "ppo.eval_every=1"]
    settings += ["ppo.ptx_coef=0.5", "ppo.ptx_data=texts.jsonl", "ppo.ptx_batch_size=4", "ppo.batch_size=8"]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n}. " * n}) + "\n" for n in range(1, 6)))
    one = ppo(*settings, "--output", "one")
    done = on_two_processes("train", "--plugin", "ppo", *SMALL, *settings, "--output", "two")
    assert done.returncode == 0, done.stderr

    two = Path("two/ppo")
    assert json.loads((two / "alignkit.json").read_text())["processes"] == 2
    assert read_answers(one)[-1].answers == read_answers(two)[-1].answers
    for name, tensor in trained(one).items():
        torch.testing.assert_close(trained(two)[name], tensor, rtol=1e-3, atol=1e-5)
    for a, b in zip(iterations(one), iterations(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {n for n in a if "seconds" in n or n == "sampled_tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
