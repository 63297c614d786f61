"""Whole runs: every tuner on every architecture, what a run folder holds, run hooks, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from conftest import DEMONSTRATIONS
from safetensors.torch import load_file

from alignkit import yaml
from alignkit.cli import main

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma"]
Train = Callable[..., Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_tuner_trains_every_architecture_and_it_talks(
    train: Train, tuner: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("--plugin", tuner, "train.max_steps=6", "train.learning_rate=0.01", model=model)
    metrics = json.loads((folder / "alignkit.json").read_text())["metrics"]

    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    assert main(["chat", str(folder), "--prompt", "What is 2 and one?", "--max-new-tokens", "8"]) == 0


def test_a_run_folder_holds_what_it_should_and_no_pickles(train: Train) -> None:
    folder = train("--plugin", "lora", "train.max_steps=2", "train.save_steps=1")
    manifest = json.loads((folder / "alignkit.json").read_text())

    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "alignkit.json", "config.yaml", "metrics.jsonl", "README.md", "checkpoints"),
    }
    assert not (folder.parent / "sft.unfinished").exists()
    pickles = {path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert manifest["stage"] == "sft"
    assert manifest["data"]["train_rows"] == 12
    assert len(manifest["base"]["weights"]) == 64
    assert manifest["versions"].keys() >= {"alignkit", "torch", "transformers", "trl", "peft"}
    assert manifest["config"] == yaml.load(folder / "config.yaml")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_plain_libraries_read_the_result(train: Train) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = train("--plugin", "lora", "train.max_steps=2")
    whole = train("--plugin", "full", "train.max_steps=2", output="full")

    for model in (AutoPeftModelForCausalLM.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(whole)):
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        assert model(torch.tensor([prompt["input_ids"]])).logits.isfinite().all()


def test_a_full_run_is_a_base_for_the_next_and_stands_in_its_lineage(train: Train, tmp_path: Path) -> None:
    first = train("--plugin", "full", "train.max_steps=1")
    second = train("--plugin", "lora", "train.max_steps=1", "--model", str(first), output="second")

    parent = json.loads((second / "alignkit.json").read_text())["parents"]["policy"]
    assert Path(parent["folder"]) == first


def test_the_config_of_a_run_reproduces_it(train: Train, tmp_path: Path) -> None:
    folder = train("--plugin", "lora", "train.max_steps=3", "tuner.lora_dropout=0.1")
    again = str(tmp_path / "again")

    assert main(["train", "-c", str(folder / "config.yaml"), "--output", again]) == 0
    assert all(torch.equal(t, weights(folder)[n]) for n, t in weights(tmp_path / "again" / "sft").items())


def test_the_seed_decides_the_adapter(train: Train) -> None:
    one, two = (train("train.max_steps=1", f"train.seed={seed}", output=str(seed)) for seed in (1, 2))

    assert any(not torch.equal(t, weights(two)[n]) for n, t in weights(one).items())


def test_a_finished_run_is_overwritten_only_with_overwrite(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("train.max_steps=1")
    command = ["train", "-c", str(folder / "config.yaml")]

    assert main(command) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert main([*command, "train.seed=7"]) == 2
    assert f"{folder} is a finished run. Choose another --output, or add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "train.seed=7"]) == 0
    assert json.loads((folder / "alignkit.json").read_text())["config"]["stages"]["sft"]["train"]["seed"] == 7


def test_a_folder_that_is_no_run_is_never_removed(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "sft").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "thesis.tex").write_text("years of work")

    with pytest.raises(AssertionError):
        train("--overwrite", "train.max_steps=1")
    assert "exists and is not a run of alignkit" in capsys.readouterr().err
    assert (tmp_path / "out" / "sft" / "thesis.tex").exists()


def test_run_hooks_are_called_in_their_order(train: Train, install: Callable[..., None], tmp_path: Path) -> None:
    install(
        "spy",
        """
        import os
        from alignkit import hookimpl

        def note(what):
            with open(os.environ["SPY"], "a") as file:
                file.write(what + "\\n")

        @hookimpl
        def alignkit_run_start(run):
            note(f"start with {len(run.train_rows)} rows")

        @hookimpl
        def alignkit_load_model(run, role, kwargs):
            from transformers import AutoModelForCausalLM
            note(f"load {role}")
            return AutoModelForCausalLM.from_pretrained(run.base, attn_implementation="eager", **kwargs)

        @hookimpl
        def alignkit_model_ready(run, role, model):
            note(f"ready {role} {model.config._attn_implementation}")

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import TrainerCallback

            class Count(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    note(f"step {state.global_step}")

            return [Count()]

        @hookimpl
        def alignkit_run_end(run, result):
            note(f"end {result.folder.name} {result.metrics['eval_loss'] > 0}")
        """,
    )
    os.environ["SPY"] = str(tmp_path / "spy.txt")
    train("--plugin", "spy", "train.max_steps=2")

    assert (tmp_path / "spy.txt").read_text().splitlines() == [
        *("start with 12 rows", "load policy", "ready policy eager", "step 1", "step 2", "end sft True")
    ]


def test_a_third_partys_loss_is_picked_by_name(train: Train, install: Callable[..., None]) -> None:
    install(
        "halved",
        """
        from dataclasses import dataclass
        from alignkit import Loss, LossOutput, TokenLogps, hookimpl, option

        @dataclass(frozen=True)
        class Config:
            by: float = option(2.0, "the divisor")

        def build(config):
            def loss(batch):
                return LossOutput(-batch.logps.sum() / batch.num_tokens / config.by, {"by": config.by})
            return loss

        @hookimpl
        def alignkit_loss():
            return [Loss(name="halved", summary="half the loss", batch=TokenLogps, config=Config, build=build)]
        """,
    )
    plain = json.loads((train("train.max_steps=1") / "alignkit.json").read_text())
    halved = train("--plugin", "halved", "train.max_steps=1", "loss.by=4", output="halved")
    manifest = json.loads((halved / "alignkit.json").read_text())

    assert manifest["metrics"]["first_eval_loss"] == pytest.approx(plain["metrics"]["first_eval_loss"] / 4)
    assert manifest["metrics"]["eval_by"] == pytest.approx(4)
    assert manifest["versions"]["alignkit-halved"] == "0.1"
    assert manifest["config"]["plugins"] == ["halved", "sft"]


# --- kill and resume -----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """A command of a run with dropout, a checkpoint every third step and twenty steps."""
    data = tmp_path / "demos.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))

    def build(tuner: str, output: str, *more: str) -> list[str]:
        given = ["--plugin", "sft", "--plugin", tuner, "--model", str(tiny_model()), "--data", str(data)]
        dropout = [] if tuner == "full" else ["tuner.lora_dropout=0.1"]
        settings = ["max_steps=20", "save_steps=3", "eval_steps=4", "per_device_train_batch_size=2", "logging_steps=1"]
        settings += ["gradient_accumulation_steps=2", "use_cpu=true"]
        table = [f"train.{setting}" for setting in settings]
        return ["train", *given, "--output", output, *dropout, *table, *more]

    return build


def _wait_for(condition: Callable[[], bool], process: processes.Process) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.002)


def _checkpoints(output: Path) -> list[Path]:
    return list((output / "sft.unfinished" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_killed_and_resumed_ends_in_the_same_weights(
    command: Callable[..., list[str]], tuner: str, tmp_path: Path
) -> None:
    assert processes.run(*command(tuner, str(tmp_path / "whole"))).returncode == 0

    process = processes.Process(*command(tuner, str(tmp_path / "cut")))
    _wait_for(lambda: len(_checkpoints(tmp_path / "cut")) >= 2, process)  # often in the middle of writing the second
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "sft").exists()
    unfinished = processes.run(*command(tuner, str(tmp_path / "cut")))
    assert "has an unfinished run. Add --resume to continue" in unfinished.stderr
    resumed = processes.run(*command(tuner, str(tmp_path / "cut"), "--resume"))

    assert "resuming from step " in resumed.stdout
    whole, cut = weights(tmp_path / "whole" / "sft"), weights(tmp_path / "cut" / "sft")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, file.read_text().splitlines()) if "loss" in line]
        for file in (tmp_path / name / "sft" / "metrics.jsonl" for name in ("whole", "cut"))
    ]
    assert losses[0] == losses[1]


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on_from_there(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert processes.run(*command("lora", str(tmp_path / "whole"))).returncode == 0

    process = processes.Process(*command("lora", str(tmp_path / "cut")))
    _wait_for(lambda: bool(_checkpoints(tmp_path / "cut")), process)
    process.send_signal(signal.SIGINT)
    stopped = process.wait()
    assert stopped.returncode == 130
    assert "stopping after this step" in stopped.stdout
    assert "To continue, add --resume to the same command" in stopped.stderr
    assert processes.run(*command("lora", str(tmp_path / "cut"), "--resume")).returncode == 0

    whole, cut = weights(tmp_path / "whole" / "sft"), weights(tmp_path / "cut" / "sft")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resume_refuses_other_settings_and_other_data(command: Callable[..., list[str]], tmp_path: Path) -> None:
    process = processes.Process(*command("lora", str(tmp_path / "cut")))
    _wait_for(lambda: bool(_checkpoints(tmp_path / "cut")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()

    other = command("lora", str(tmp_path / "cut"), "--resume", "train.seed=1")
    assert "these differ: sft.train.seed was None, is 1" in processes.run(*other).stderr
    with (tmp_path / "demos.jsonl").open("a") as file:
        file.write(json.dumps(DEMONSTRATIONS[0]) + "\n")
    same = command("lora", str(tmp_path / "cut"), "--resume")
    assert "changed since the run began: the data. Start again" in processes.run(*same).stderr


def test_resume_drops_a_checkpoint_that_was_not_completely_written(train: Train, tmp_path: Path) -> None:
    from alignkit.runs.resume import last_checkpoint

    folder = train("train.max_steps=4", "train.save_steps=2", "train.save_total_limit=9")
    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text('{"log_history": [')

    last = last_checkpoint(folder)
    assert last is not None
    assert last.name == "checkpoint-2"


def test_a_run_that_was_killed_just_before_its_renaming_is_finished_by_resume(train: Train, tmp_path: Path) -> None:
    folder = train("train.max_steps=1")
    before = (folder / "alignkit.json").read_text()
    folder.rename(folder.with_name("sft.unfinished"))

    assert train("train.max_steps=1", "--resume") == folder
    assert (folder / "alignkit.json").read_text() == before
    assert not folder.with_name("sft.unfinished").exists()


def test_a_crash_gives_ctrl_c_back(train: Train, install: Callable[..., None]) -> None:
    install(
        "crash",
        """
        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import TrainerCallback

            class Crash(TrainerCallback):
                def on_step_begin(self, *args, **kwargs):
                    raise RuntimeError("out of memory")

            return [Crash()]
        """,
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(AssertionError):
        train("--plugin", "crash", "train.max_steps=1")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_without_a_generation_config_stops_at_its_eos(train: Train, tiny_model: Callable[..., Path]) -> None:
    import shutil

    bare = tiny_model("llama").with_name("bare")
    shutil.copytree(tiny_model("llama"), bare, dirs_exist_ok=True)
    (bare / "generation_config.json").unlink()
    folder = train("train.max_steps=1", "--model", str(bare))

    assert json.loads((folder / "alignkit.json").read_text())["stop_ids"] == [0]
