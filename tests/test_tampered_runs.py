"""No change to the files of a run ends a command in a traceback, in "This is unexpected", in a hang or in half a run.

``benchmarks/fuzz.py`` tries thousands of changes. What it found is below, after a few changes of each kind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tampering
from hypothesis import HealthCheck, given, settings

from alignkit import yaml
from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.runs import answers, curves, fingerprints, lock, manifest, recorded, resume

SEEDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, and data for commands."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tampering.make_runs(tiny_model())
    return folder


@pytest.fixture
def whole(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs, in another folder than the current one."""
    for file in trained.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return trained / "whole" / "runs"


@pytest.fixture
def runs(whole: Path) -> Path:
    """A copy of the runs, in the current folder."""
    return tampering.fresh(whole, Path("runs"))


@pytest.mark.parametrize(
    ("commands", "examples"),
    [(tampering.READ, 30), (tampering.LOAD, 6), (tampering.TRAIN, 3)],
    ids=["read", "load", "train"],
)
def test_commands_on_runs_with_one_or_two_changes(
    whole: Path, commands: Mapping[str, list[str]], examples: int
) -> None:
    @settings(SEEDED, max_examples=examples)
    @given(tampering.tampered(whole, sorted(commands)))
    def tried(case: tampering.Case) -> None:
        assert case.fault(whole, commands) is None

    tried()


# --- records ---------------------------------------------------------------------------------------------------------


def edit(file: Path, path: list[Any], value: Any) -> None:
    """Set a value in a JSON or YAML file."""
    content = yaml.loads(file.read_text(), "")
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stage"], 3, "stage must be a string"),
        (["base"], None, "base must be a table"),
        (["base", "located"], [], "base.located must be a string"),
        (["parents"], {"policy": "x"}, "parents.policy must be a table"),
        (["steps"], True, "steps must be an integer"),
        (["seconds"], "long", "seconds must be a number"),
        (["finished"], "2026-11-26", "finished must be a time with a time zone"),
        (["metrics", "eval_loss"], "low", "metrics.eval_loss must be a number or null"),
        (["stop_ids"], ["x"], "stop_ids must be an integer"),
        (["config", "stages", "sft"], [], "config.stages.sft must be a table"),
        (["config", "plugins"], [None], "config.plugins must be a string"),
    ],
)
def test_a_wrong_value_in_a_manifest_is_an_error_that_names_it(
    path: list[Any], value: Any, message: str, runs: Path
) -> None:
    manifest.read(runs / "sft")
    edit(runs / "sft/alignkit.json", path, value)

    with pytest.raises(AlignkitError, match=rf"alignkit.json: {message}: alignkit did not write it, or it was edited"):
        manifest.read(runs / "sft")


def test_a_missing_value_of_a_manifest_is_an_error_that_names_it(runs: Path) -> None:
    edit(runs / "sft/alignkit.json", ["base"], {"name": "x"})
    record = manifest.read(runs / "sft")

    assert record["base"].get("license") is None
    with pytest.raises(AlignkitError, match=r"alignkit.json has no base.located"):
        record["base"]["located"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no stages"),
        ("[1]", "must be a mapping"),
        ("{stages: {}}", "has no stage"),
        ("{stages: {sft: 3}}", "stages.sft must be a table"),
        ("{stages: {sft: {train: []}}}", "stages.sft.train must be a table"),
    ],
)
def test_a_config_that_is_none_of_a_run_is_an_error(content: str, message: str, runs: Path) -> None:
    (runs / "sft/config.yaml").write_text(content)

    with pytest.raises(AlignkitError, match=message):
        recorded.read(runs / "sft")


def test_a_run_whose_config_lacks_a_key_is_left_out_of_the_report(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.load(runs / "dpo/config.yaml")
    (runs / "dpo").rename(runs / "dpo.unfinished")
    (runs / "dpo.unfinished/config.yaml").write_text(yaml.dumps({**config, "plugins": []}))
    assert main(["report", "runs"]) == 0
    assert "not shown" not in capsys.readouterr().out

    del config["plugins"]
    (runs / "dpo.unfinished/config.yaml").write_text(yaml.dumps(config))
    assert main(["report", "runs"]) == 0
    assert "not shown: dpo.unfinished: runs/dpo.unfinished/config.yaml has no plugins" in capsys.readouterr().out


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "checkpoints/checkpoint-2/optimizer.pt"])
def test_a_pipe_in_a_run_folder_is_refused_and_not_read(
    name: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "sft" / name).unlink()
    os.mkfifo(runs / "sft" / name)

    assert main(["show", "runs/sft"]) == 2
    assert f"runs/sft/{name} is neither a file nor a folder" in capsys.readouterr().err


def test_a_lock_that_is_a_pipe_is_held_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".sft.lock")

    assert not lock.is_held(tmp_path / "sft")


def test_a_chat_template_that_is_no_text_is_an_error(runs: Path) -> None:
    (runs / "sft/chat_template.jinja").write_bytes(b"{{ x }}\xff")

    with pytest.raises(AlignkitError, match=r"cannot read .*chat_template.jinja"):
        fingerprints.of(runs / "sft")


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\xff" * 7 + b"\x7f{}"], ids=repr)
def test_weights_with_a_damaged_header_have_another_fingerprint(content: bytes, runs: Path) -> None:
    before = fingerprints.weights(runs / "sft")
    (runs / "sft/adapter_model.safetensors").write_bytes(content)

    assert fingerprints.weights(runs / "sft") != before


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"{}x"], ids=["empty", "header", "longer"]
)
def test_weights_that_are_damaged_are_an_error_that_names_the_file(
    content: bytes, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, name in (("sft", "adapter_model.safetensors"), ("dpo", "model.safetensors")):
        (runs / run / name).write_bytes(content)
        assert main(["chat", f"runs/{run}", "--prompt", "Hi", "--max-new-tokens", "1"]) == 2
        assert f"cannot read runs/{run}/{name}: " in capsys.readouterr().err


def test_lines_of_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', "[" * 9000, f'{{"step": 2, "loss": {10**400}}}', '{"step": 3, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))

    (curve,) = curves.read(tmp_path / "metrics.jsonl")
    assert [point.step for point in curve.train] == [1, 3]


def test_scores_of_answers_that_are_no_numbers_are_unknown(tmp_path: Path) -> None:
    rows = [{"step": 0, "prompt": "a", "answer": "b", "score": score} for score in (1.5, "high", None, [2], 1e999)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (evaluation,) = answers.read(tmp_path)
    assert evaluation.columns == {"score": [1.5, None, None, None, None]}


@pytest.mark.parametrize("content", ["", "[", "[]", "[" * 9000, "\x00"], ids=lambda content: repr(content[:3]))
def test_a_model_whose_config_is_no_object_is_an_error(
    content: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "dpo/config.json").write_text(content)
    check = ["check", "--plugin", "dpo", "--data", "rankings.jsonl", "--output", "new", "dpo.policy=runs/dpo"]

    assert main(check) == 2
    assert "runs/dpo: its folder has changed since it was trained (config.json)" in capsys.readouterr().err
    record = manifest.read(runs / "dpo")
    del record["fingerprints"]["config"]  # as older versions wrote it
    manifest.write_json(runs / "dpo/alignkit.json", record)
    assert main(check) == 2
    assert "runs/dpo/config.json" in capsys.readouterr().err


# --- checkpoints -----------------------------------------------------------------------------------------------------

RESUME = ["train", "--plugin", "sft", "--output", "runs", "--resume", "train.max_steps=3"]


def test_a_checkpoint_that_cannot_be_read_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "sft").rename(runs / "sft.unfinished")
    checkpoint = runs / "sft.unfinished/checkpoints/checkpoint-2"
    shutil.copy(checkpoint / "scheduler.pt", "scheduler.pt")
    (checkpoint / "scheduler.pt").write_bytes(b"[" * 100)

    assert main(RESUME) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"alignkit: error: cannot resume from {checkpoint}: ")
    assert error.endswith("Delete this folder to resume from an earlier checkpoint, or start again with --overwrite")
    shutil.copy("scheduler.pt", checkpoint)
    assert main(RESUME) == 0  # nothing else was lost


@pytest.mark.parametrize(
    "state", [[], {}, {"global_step": 1, "log_history": []}, {"global_step": 2, "log_history": [3]}], ids=repr
)
def test_a_checkpoint_with_another_state_than_its_own_is_not_complete(state: Any, runs: Path) -> None:
    assert [each.name for each in resume.checkpoints(runs / "sft")] == ["checkpoint-1", "checkpoint-2"]
    (runs / "sft/checkpoints/checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    (runs / "sft/checkpoints/checkpoint-x").mkdir()

    assert [each.name for each in resume.checkpoints(runs / "sft")] == ["checkpoint-1"]


def test_surroundings_that_were_edited_are_an_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "sft/checkpoints/surroundings.json").write_text('["the data"]')

    assert main(RESUME) == 2
    assert "surroundings.json: the content must be a table" in capsys.readouterr().err
