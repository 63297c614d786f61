"""When a finished run is used again, and when it is not what the config describes any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_plan import edit, refused, run
from test_plan import folder as folder

from alignkit.cli import main
from alignkit.runs import fingerprints


def train(stage: str, *arguments: str) -> int:
    return main(["--debug", "train", "-c", "run.yaml", "--plugin", stage, *arguments])


def test_the_default_model_is_not_looked_for_if_the_run_has_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few users with a model of their own have downloaded the bundled one."""
    monkeypatch.setattr("alignkit.bundled.has_gguf", lambda: False)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(folder / "empty"))
    assert train("sft") == 0
    Path("run.yaml").write_text(Path("run.yaml").read_text().replace("model: base\n", ""))

    assert run() == 0


def ppo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a plan of PPO says, which needs the reward model."""
    capsys.readouterr()
    Path("prompts.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Hello"}\n')
    main(["check", "-c", "run.yaml", "--plugin", "ppo", "--data", "prompts.jsonl", *arguments])
    output = capsys.readouterr()
    return output.out + output.err


def test_a_run_started_from_another_run_than_the_config_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shutil.copytree("runs/sft", "kept/sft")
    assert train("sft", "--output", "other", "train.learning_rate=0.01") == 0

    for same in ("runs/sft", "./runs/sft", str(folder / "runs/sft"), "kept/sft"):
        assert "training can start" in ppo(capsys, f"rm.policy={same}")
    assert "rm.policy was 'runs/sft', is 'base'" in ppo(capsys, "rm.policy=base")
    assert "rm.policy was 'runs/sft', is 'other/sft'" in ppo(capsys, "rm.policy=other/sft")
    assert run("--overwrite", "rm.policy=base") == 0
    assert "training can start" in ppo(capsys, "rm.policy=base")
    assert "rm.policy was 'base', is 'runs/sft'" in ppo(capsys, "rm.policy=runs/sft")


def test_in_a_copy_of_a_project_the_runs_beside_a_run_are_its_parents(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folders that the runs record still hold the former weights."""
    assert run() == 0
    assert run("--output", "elsewhere", "rm.policy=runs/sft") == 0
    assert train("sft", "--output", "elsewhere", "train.learning_rate=0.01") == 0
    assert "training can start" in ppo(capsys, "--output", "elsewhere")  # not the one beside it
    shutil.copytree(folder, folder.with_name("copy"))
    monkeypatch.chdir(folder.with_name("copy"))
    assert "training can start" in ppo(capsys)
    assert train("sft", "--overwrite", "train.learning_rate=0.01") == 0

    assert "its policy runs/sft was trained again" in ppo(capsys)
    assert "runs/rm is a finished run. Choose another --output" in refused(capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda: Path("t.jinja").write_text(Path("t.jinja").read_text() + "!"),
            "the chat template t.jinja has changed",
        ),
        (lambda: Path("held.jsonl").write_text(Path("demos.jsonl").read_text()), "the held-out data held.jsonl has"),
        (lambda: edit("base/config.json", lambda c: c.update(rms_norm_eps=0.1)), "base has changed (config.json)"),
    ],
    ids=["template", "held-out", "config"],
)
def test_a_file_that_a_run_was_made_from_has_changed(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[], None], said: str
) -> None:
    Path("t.jinja").write_text("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    Path("held.jsonl").write_text("".join(Path("demos.jsonl").read_text().splitlines(keepends=True)[:4]))
    settings = ["chat_template=t.jinja", "sft.data.eval_path=held.jsonl"]
    assert train("sft", *settings) == 0
    assert train("sft", *settings) == 0
    assert "nothing to train" in capsys.readouterr().out
    shutil.copytree("runs/sft", "runs/sft.unfinished")
    change()

    assert said in refused(capsys, *settings)
    assert main(["train", "-c", "run.yaml", "--plugin", "sft", *settings]) == 2
    assert "runs/sft is a finished run" in capsys.readouterr().err
    shutil.rmtree("runs/sft")
    Path("runs/sft.unfinished/alignkit.json").unlink()
    assert main(["train", "-c", "run.yaml", "--plugin", "sft", *settings, "--resume"]) == 2
    assert "changed since the run began: the " in capsys.readouterr().err


def test_what_a_library_rewrites_in_a_config_is_no_change(tmp_path: Path) -> None:
    for name, content in {
        "old": {"vocab_size": 8, "torch_dtype": "float32", "transformers_version": "4.0"},
        "new": {"transformers_version": "5.0", "dtype": "bfloat16", "vocab_size": 8},
        "other": {"vocab_size": 9},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    old, new, other = (fingerprints.of(tmp_path / name) for name in ("old", "new", "other"))

    assert not fingerprints.differences(old, new)
    assert fingerprints.differences(old, other) == ["config.json"]
    del old["config"]  # of a former version
    assert not fingerprints.differences(old, other)
