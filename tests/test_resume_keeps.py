"""A resume keeps the settings that its command does not set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import record, weights

from alignkit import yaml
from alignkit.cli import main
from alignkit.config import named_code
from alignkit.runs import resume
from alignkit.runs.plan import pipeline

STEPS = ["train.save_strategy=steps", "train.save_steps=1", "train.lr_scheduler_type=constant"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")


def recorded(folder: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the settings in the record of a run, as an earlier version could have written them."""
    for name, load in (("config.yaml", yaml.load), ("alignkit.json", lambda file: json.loads(file.read_text()))):
        file = Path(folder, name)
        content = load(file)
        change(content if name == "config.yaml" else content["config"])
        file.write_text(yaml.dumps(content) if name == "config.yaml" else json.dumps(content))


def test_a_resume_that_sets_only_what_changes_is_the_run_with_all_settings(
    tiny_model: Callable[..., Path], tiny_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, the data, the plugin of the tuner and every other setting are those of the run."""
    words = ["train", "--plugin", "full", "--plugin", "sft", "--model", str(tiny_model())]
    words += ["--data", str(tiny_data("demonstrations")), "train.learning_rate=0.003", "train.use_cpu=true", *STEPS]
    assert main([*words, "--output", "whole", "train.max_steps=4"]) == 0
    assert main([*words, "train.max_steps=2"]) == 0
    capsys.readouterr()

    assert main(["train", "--plugin", "sft", "--resume", "train.max_steps=4"]) == 0
    printed = capsys.readouterr().out
    assert "resuming from step 2" in printed
    kept = next(line for line in printed.splitlines() if line.strip().startswith("kept"))
    assert f"model={tiny_model()}" in kept
    assert "sft.train.learning_rate=0.003" in kept
    assert "max_steps" not in kept
    whole, resumed = weights(Path("whole/sft")), weights(Path("runs/sft"))
    assert all((whole[name] == tensor).all() for name, tensor in resumed.items())
    assert record(Path("runs/sft"))["config"]["stages"] == record(Path("whole/sft"))["config"]["stages"]

    assert main(["train", "--plugin", "sft", "--resume", "train.learning_rate=0.1", "train.max_steps=6"]) == 2
    assert "sft.train.learning_rate was 0.003, is 0.1" in capsys.readouterr().err
    (plan,) = pipeline_of("sft", "train.num_train_epochs=5").to_train
    assert "max_steps" not in plan.config.train  # it would take precedence over the epochs
    (plan,) = pipeline_of("sft", "train.seed=1").to_train
    assert plan.config.train["max_steps"] == 4


def pipeline_of(stage: str, *overrides: str) -> Any:
    from alignkit.cli.common import read_arguments

    return pipeline(*read_arguments([stage], None, None, [], None, list(overrides)), resume=True)


def test_a_resume_depends_on_the_code_of_a_reward_and_not_on_recorded_settings_without_effect(
    run_stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions accepted ``ptx_length`` and ``kl_horizon`` where they have no effect."""
    small = ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=4", "ppo.save_every=1", "data.eval_size=0"]
    small += ["ppo.policy=base", "reward.name=function", "reward.call=lengths:length", "train.max_steps=-1"]
    file, code = (
        Path("lengths.py"),
        "def length(prompts, answers):\n    return [float(len(a)) for a in answers]\n",
    )
    file.write_text(code)
    run = run_stage("ppo", *small, "ppo.iterations=1")
    recorded(str(run), lambda config: config["stages"]["ppo"].update(ptx_length=128, kl_horizon=99))

    with pytest.raises(AssertionError, match=r"ppo\.ptx_length has no effect without ppo\.ptx_coef"):
        run_stage("ppo", *small, "ppo.ptx_length=128", "ppo.iterations=2", "--resume")
    assert run_stage("ppo", *small, "ppo.iterations=1") == run
    assert "nothing to train" in capsys.readouterr().out
    file.write_text(code.replace("float", "-float"))
    with pytest.raises(AssertionError, match="ppo is a finished run. Choose another --output"):
        run_stage("ppo", *small, "ppo.iterations=1")
    assert run_stage("ppo", *small, "ppo.iterations=2", "--resume") == run
    assert record(run)["steps"] == 2
    output = capsys.readouterr().out
    assert "warning: lengths:length is in a file that has changed since the run began" in output
    assert "kept" not in output
    settings = ["ppo.iterations was 1, is 2", "the file of lengths:length has changed"]
    assert record(run)["longer"] == [{"step": 1, "settings": settings}]


def test_an_evaluation_that_equals_the_one_before_the_checkpoint_is_dropped(folder: None) -> None:
    """The policy that a run keeps is evaluated after the last checkpoint. A resume evaluates it again."""
    before = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_score": 0.5}]
    checkpoint = Path("checkpoint-2")
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": before}))
    after = [{"step": 2, "train_runtime": 9.0}, {"step": 2, "eval_score": 0.5}]
    Path("metrics.jsonl").write_text("".join(f"{json.dumps(log)}\n" for log in [*before, *after]) + '{"step": 2, "ev')

    resume._drop_metrics_after(Path("metrics.jsonl"), checkpoint)

    assert [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()] == before


def test_the_file_of_a_function_is_found_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting may be a stranger's. The packages around a module run code when they are imported."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "rewards_of_others"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "letters.py").write_text("def score(prompts, answers): ...\n")

    found = named_code.fingerprints({"reward": {"call": "rewards_of_others.letters:score"}})
    assert list(found) == ["rewards_of_others.letters:score"]
