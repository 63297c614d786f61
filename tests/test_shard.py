"""``train.shard: fsdp2``: the same runs as with whole weights, with a part of them in each process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import processes
import pytest
import torch
from conftest import made_once
from safetensors.torch import load_file

from alignkit import ConfigError, testing
from alignkit.cli import main
from alignkit.training.shard import check

PROCESSES = 2
HERE = Path(__file__).parent
COMMON = ["--debug", "train", "--model", "base", "train.use_cpu=true", "train.bf16=false", "data.eval_size=4"]
COMMON += ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=2", "train.learning_rate=0.003"]
COMMON += ["train.lr_scheduler_type=constant", "train.lr_scheduler_kwargs={}"]
OFFLINE = ["train.max_steps=2", "train.logging_steps=1", "train.save_steps=1", "train.eval_steps=2"]
BEST = ["train.max_steps=4", "train.save_steps=2", "train.load_best_model_at_end=true"]
BEST += ["train.metric_for_best_model=loss", "train.greater_is_better=true"]
ONLINE = ["policy=base", "batch_size=8", "minibatches=2", "iterations=2", "response_length=8", "save_every=1"]
PPO = [*(f"ppo.{setting}" for setting in ONLINE), "reward.name=function", "reward.call=shard_rewards:letters"]
PPO += ["ppo.ema=0.5", "ppo.keep=last", "ppo.ptx_coef=1", "ppo.ptx_data=demonstrations.jsonl", "ppo.ptx_batch_size=4"]
GRPO = [*(f"grpo.{setting}" for setting in ONLINE), "grpo.samples_per_prompt=2", "grpo.redraws=2"]
GRPO += ["grpo.eval_every=1", "rollout.merge_lora=true", "reward.name=sum", "reward.path=rm-lora-null/rm"]
GRPO += ["reward.parts=[{name: function, call: shard_rewards:picky}, {name: reward-model, weight: 1e-9}]"]
GRPO += ["reward.on_error=skip"]  # processes score some answers one by one, and draw others again

CHECKPOINTING = "train.gradient_checkpointing=true"

RUNS = {  # name -> stage, tuner, data, settings; each is trained with whole weights and sharded
    "sft-qlora": ("sft", "qlora", "demonstrations", [*OFFLINE, CHECKPOINTING]),
    "sft-full": ("sft", "full", "demonstrations", [*OFFLINE, *BEST]),  # the best are those of step 2
    "dpo-full": ("dpo", "full", "rankings", [*OFFLINE, "dpo.policy=base", "dpo.response_length=4"]),
    "kto-lora": ("kto", "lora", "ratings", [*OFFLINE, "kto.policy=base", "kto.response_length=4"]),
    "rahf-lora": ("rahf", "lora", "rankings", [*OFFLINE, "rahf.policy=base", "rahf.response_length=4"]),
    "rm-lora": ("rm", "lora", "rankings", [*OFFLINE, "rm.policy=base"]),
    "ppo-qlora": ("ppo", "qlora", "prompts", [*PPO, CHECKPOINTING]),
    "grpo-lora": ("grpo", "lora", "prompts", GRPO),
}
RESUMED = ("sft-qlora", "ppo-qlora", "grpo-lora")  # sharded in two parts


def words(name: str, shard: str, *more: str) -> list[str]:
    stage, tuner, data, settings = RUNS[name]
    given = ["--plugin", stage, "--plugin", tuner, "--data", f"{data}.jsonl", "--output", f"{name}-{shard}"]
    return [*COMMON, *given, f"train.shard={shard}", *settings, *more]


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all ``RUNS``, trained by two processes."""
    return made_once(tmp_path_factory, "sharded", lambda folder: train_all(folder, tiny_model()))


def train_all(folder: Path, model: Path) -> None:
    (folder / "base").symlink_to(model)
    for kind, rows in testing.DATA.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "shard_rewards.py").write_text(
        "def letters(prompts, answers):\n    return [answer.count('e') / 4 for answer in answers]\n"
        "def picky(prompts, answers):\n    assert not any('S' in answer for answer in answers)\n"
        "    return [float(answer.count('e') > 1) for answer in answers]\n"
    )
    commands = list[list[str]]()
    for name in RUNS:
        commands.append(words(name, "null"))
        if name in RESUMED:
            half = "train.max_steps=1" if name.startswith("sft") else f"{RUNS[name][0]}.iterations=1"
            commands += [words(name, "fsdp2", half), words(name, "fsdp2", "--resume")]
        else:
            commands.append(words(name, "fsdp2"))
    (folder / "commands.jsonl").write_text("".join(json.dumps(command) + "\n" for command in commands))
    (folder / "report").mkdir()
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNKIT_DEBUG": "", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    with contextlib.chdir(folder):
        done = processes.run_several(2, "commands.jsonl", "report", env=env, script=HERE / "shard_runs.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in run.glob("*.safetensors") for name, tensor in load_file(file).items()}


def both(trained: Path, name: str) -> tuple[Path, Path]:
    """The run folders with whole weights, and sharded."""
    stage = RUNS[name][0]
    return trained / f"{name}-null" / stage, trained / f"{name}-fsdp2" / stage


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_is_that_with_whole_weights(name: str, trained: Path) -> None:
    """Weights, metrics and files; those in ``RESUMED`` were sharded, saved, and sharded again."""
    plain, sharded = both(trained, name)
    records = [json.loads((run / "alignkit.json").read_text()) for run in (plain, sharded)]
    metrics = records[1]["metrics"]

    assert [record["processes"] for record in records] == [PROCESSES, PROCESSES]
    assert weights(sharded).keys() == weights(plain).keys()
    for tensor_name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(sharded)[tensor_name], tensor, rtol=1e-4, atol=1e-5)
    assert metrics == pytest.approx(records[0]["metrics"], rel=1e-4, abs=1e-5)
    for file in ("config.json", "adapter_config.json"):
        if (plain / file).exists():
            assert json.loads((sharded / file).read_text()) == json.loads((plain / file).read_text())


def logged(run: Path, name: str) -> list[float]:
    return [log[name] for log in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in log]


@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_clipped_by_the_norm_of_all_their_parts(name: str, trained: Path) -> None:
    plain, sharded = both(trained, name)

    assert logged(plain, "grad_norm")
    assert logged(sharded, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_have_the_optimizer_and_averages_of_runs_with_whole_weights(name: str, trained: Path) -> None:
    plain, sharded = (sorted(run.glob("checkpoints/checkpoint-*"))[-1] for run in both(trained, name))
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (plain, sharded)]

    assert {file.name for file in plain.iterdir()} == {file.name for file in sharded.iterdir()}
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)
    for file in plain.glob("*.safetensors"):
        torch.testing.assert_close(load_file(sharded / file.name), load_file(file), rtol=1e-4, atol=1e-5)


def test_processes_draw_different_numbers_of_answers_again(trained: Path) -> None:
    for run in both(trained, "grpo-lora"):
        assert sum(logged(run, "redrawn")) > 0
        assert sum(logged(run, "eval_reward_errors")) > 0


def test_each_process_holds_its_part_of_the_weights_and_no_whole_ones(trained: Path) -> None:
    files = sorted((trained / "report").iterdir())
    lines: list[dict[str, Any]] = [json.loads(line) for file in files for line in file.read_text().splitlines()]

    assert len(files) == PROCESSES
    assert len(lines) == PROCESSES * (len(RUNS) + len(RESUMED) + 1)  # DPO in full has a reference too
    for line in lines:
        assert line["processes"] == PROCESSES
        assert line["whole_weights"] == 0
        for held, whole in (line["all"], line["frozen"]):
            assert held <= 0.6 * whole


@pytest.mark.parametrize("name", ["dpo-full", "ppo-qlora"])
def test_the_plan_counts_the_parts_of_weights_that_a_process_holds(
    name: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(str(trained))
    reported = map(json.loads, (trained / "report" / "0.jsonl").read_text().splitlines())
    models = {line["model"]: line["all"] for line in reported if line["run"] == f"{name}-fsdp2"}

    def planned(shard: str) -> dict[str, int]:
        plan = ["plan" if word == "train" else word for word in words(name, shard)]
        assert main([*plan, "--processes", str(PROCESSES), "--device", "cpu", "--json"]) == 0
        parts: dict[str, int] = json.loads(capsys.readouterr().out)["phases"]["training"]
        return parts

    plain, sharded = planned("null"), planned("fsdp2")
    spared = sum(plain[part] - sharded[part] for part in ("frozen weights", "trained weights"))
    assert spared == sum(whole - held for held, whole in models.values())
    assert sharded["optimizer states"] == pytest.approx(plain["optimizer states"] / PROCESSES, rel=0.01)
    assert sharded["gathered weights"] <= 3 * sum(whole for _, whole in models.values())


@pytest.mark.parametrize(
    ("processes", "shard", "message"),
    [
        ("1", "fsdp2", "train.shard: name the number of processes of the run, as in plan --processes 2"),
        ("3", "null", "grpo.batch_size=8 cannot be divided among 3 processes"),
    ],
)
def test_a_plan_is_refused_for_processes_that_the_run_cannot_have(
    processes: str, shard: str, message: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(str(trained))
    plan = ["plan" if word == "train" else word for word in words("grpo-lora", shard)]

    assert main([*plan[1:], "--processes", processes]) == 2
    assert f"alignkit: error: {message}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("processes", "settings", "message"),
    [
        (1, [], "train.shard: there is only one process"),
        (2, ["optimizer.name=adafactor"], "train.shard: the optimizer adafactor cannot update parts of weights"),
        (2, ["train.torch_compile=true"], "train.shard: fsdp2 does not support train.torch_compile"),
        (2, ["train.shard=fsdp"], r"train.shard: Input should be 'fsdp2' \(got 'fsdp'\)"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_a_model_is_loaded(
    processes: int, settings: list[str], message: str, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.training.run.Run.processes", processes)
    monkeypatch.setattr("alignkit.training.loading.load", None)
    with pytest.raises(AssertionError, match=message):
        run_stage("sft", "train.shard=fsdp2", *settings)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (
            "ppo",
            ["ppo.policy=base", "ppo.ptx_coef=1", "ppo.ptx_batch_size=3"],
            "ppo.ptx_batch_size=3: with train.shard",
        ),
        ("rm", ["rm.policy=base", "rm.forward_tokens=64"], "rm.forward_tokens: with train.shard"),
    ],
)
def test_stages_and_settings_that_would_hang_are_refused(
    stage: str, settings: list[str], message: str, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.training.run.Run.processes", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match=message):
        run_stage(stage, "train.shard=fsdp2", *settings)


def test_a_stage_is_refused_whose_trainer_does_not_work_on_sharded_models() -> None:
    stage = SimpleNamespace(component=SimpleNamespace(name="own", shards=False))
    config = SimpleNamespace(stage=stage, tuner=stage, train={"shard": "fsdp2"})
    with pytest.raises(ConfigError, match="train.shard: fsdp2 does not support the stage own yet"):
        check(cast(Any, SimpleNamespace(config=config)))
