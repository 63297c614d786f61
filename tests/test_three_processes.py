"""Training in three real processes, between which neither batches nor held-out rows divide evenly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import on_cpu
from processes import run_several, start_several
from safetensors.torch import load_file
from stage_runs import RANKINGS

from alignkit.cli import main
from alignkit.runs import manifest
from alignkit.testing import DEMONSTRATIONS

Words = Callable[..., list[str]]
ROWS = {"sft": DEMONSTRATIONS, "rm": RANKINGS, "dpo": RANKINGS, "kto": RANKINGS, "rahf": RANKINGS}


@pytest.fixture
def words(tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Words:
    """``words("sft", "one", "train.max_steps=3")``: the command of a run whose folder is ``one/sft``."""
    monkeypatch.chdir(tmp_path)

    def command(stage: str, output: str, *more: str) -> list[str]:
        file = Path(f"{stage}.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]), encoding="utf-8")
        small = ["train.use_cpu=true", "train.bf16=false", "train.learning_rate=1e-3"]
        base = [] if stage == "sft" else [f"{stage}.policy=base"]
        base += [f"{stage}.response_length=4"] if stage in ("dpo", "kto", "rahf") else []
        given = ["--plugin", stage, "--plugin", "lora", "--model", str(tiny_model()), "--data", str(file)]
        return ["train", *given, "--output", output, *base, *small, *more]

    return command


@pytest.mark.parametrize("stage", ROWS)
def test_uneven_rows_give_the_held_out_results_of_one_process(stage: str, words: Words) -> None:
    """Of seven held-out rows in batches of two, one process has only one in the last batch, and the others none."""
    settings = ["data.eval_size=7", f"train.max_steps={2 if stage == 'rahf' else 1}"]
    size = 1 if stage == "rahf" else 2  # so that both steps have whole batches, which no row is repeated to fill
    of_one, of_three = (
        [f"train.per_device_train_batch_size={n * size}", f"train.per_device_eval_batch_size={n * 2}"] for n in (3, 1)
    )
    assert main(words(stage, "one", *settings, *of_one)) == 0
    done = run_several(3, *words(stage, "three", *settings, *of_three), env=on_cpu())
    assert done.returncode == 0, done.stderr

    one, three = (manifest.read(Path(output) / stage) for output in ("one", "three"))
    assert three["processes"] == 3
    names = [name for name in one["metrics"] if "eval_" in name and not name.endswith(("_runtime", "_per_second"))]
    assert any("loss" in name for name in names)
    for name in names:
        assert three["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4, abs=1e-4), name


def test_fewer_rows_than_processes_are_repeated(words: Words) -> None:
    """Of two rows, one is trained on twice in each step: it depends on the shuffled order which."""

    def trained(output: str, rows: list[int], size: int) -> dict[str, torch.Tensor]:
        command = words(
            "sft", output, "data.eval_size=0", "train.max_steps=1", f"train.per_device_train_batch_size={size}"
        )
        Path("sft.jsonl").write_text("".join(json.dumps(DEMONSTRATIONS[n]) + "\n" for n in rows), encoding="utf-8")
        if size == 1:
            done = run_several(3, *command, env=on_cpu())
            assert done.returncode == 0, done.stderr
        else:
            assert main(command) == 0
        return load_file(Path(output) / "sft" / "adapter_model.safetensors")

    three, *of_one = trained("three", [0, 1], 1), trained("first", [0, 1, 0], 3), trained("second", [0, 1, 1], 3)
    distances = [max(float((one[name] - three[name]).abs().max()) for name in three) for one in of_one]
    assert min(distances) < 1e-6 < 1e-4 < max(distances)


def test_a_killed_process_ends_the_other_two_and_the_run_continues(words: Words, install: Callable[..., None]) -> None:
    """The result is that of a run that was not interrupted, bit for bit."""
    install(
        "killed",
        """
        import os, signal
        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import TrainerCallback

            class Kill(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if os.environ["RANK"] == os.environ.get("KILLED") and state.global_step == 4:
                        os.kill(os.getpid(), signal.SIGKILL)

            return [Kill()]
        """,
    )
    settings = [
        "--plugin",
        "killed",
        "data.eval_size=2",
        "train.max_steps=6",
        "train.save_steps=2",
        "train.logging_steps=3",
    ]
    settings += ["train.per_device_train_batch_size=1", "tuner.lora_dropout=0.1"]
    whole = run_several(3, *words("sft", "whole", *settings), env=on_cpu())
    assert whole.returncode == 0, whole.stderr

    cut = [each.wait() for each in start_several(3, *words("sft", "cut", *settings), env={**on_cpu(), "KILLED": "1"})]
    assert [each.returncode for each in cut] == [2, -9, 2]
    for rank in (0, 2):
        assert cut[rank].stderr.count("\n") == 1
        assert f"process {rank} lost the connection to another one, which has probably failed" in cut[rank].stderr
    assert not Path("cut/sft").exists()

    resumed = run_several(3, *words("sft", "cut", *settings, "--resume"), env=on_cpu())
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 2" in resumed.stdout
    weights = [Path(f"{output}/sft/adapter_model.safetensors").read_bytes() for output in ("whole", "cut")]
    assert weights[0] == weights[1]
    logs = [
        map(json.loads, Path(f"{output}/sft/metrics.jsonl").read_text().splitlines()) for output in ("whole", "cut")
    ]
    of_steps = [[(log["step"], log["loss"], log["num_tokens"]) for log in each if "loss" in log] for each in logs]
    assert of_steps[0] == of_steps[1]
