"""Every example runs: the configs for real cards on tiny models of the same architecture, and the small tasks."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_docs import commands, write_data

from alignkit.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
TWO_STEPS = [
    *("train.max_steps=2", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"),
    *("data.eval_size=2", "ppo.batch_size=4", "ppo.response_length=8", "optimizer.name=adamw_8bit"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    return tmp_path


def test_the_readme_lists_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()

    assert len(CONFIGS) >= 6
    assert all(f"]({config.name})" in readme for config in CONFIGS)
    assert {"8gb", "12gb", "24gb"} == {config.stem.rsplit("-", 1)[1] for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_checks_as_it_is_and_trains_every_stage(
    config: Path, folder: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, for two steps a stage; optimizer states cannot be paged without a GPU."""
    write_data()
    tuner = next(name for name in ("qlora", "lora", "full") if name in config.stem.split("-"))
    for stage in ("sft", "rm", "ppo"):
        assert main(["check", "-c", str(config), "--plugin", stage]) == 0
        assert f"tuner  {tuner}:" in capsys.readouterr().out

    model = tiny_model("qwen2" if "qwen" in config.stem else "llama")
    assert main(["train", "-c", str(config), "--model", str(model), "--output", "runs", *TWO_STEPS]) == 0
    for stage in ("sft", "rm", "ppo"):
        manifest = json.loads(Path("runs", stage, "alignkit.json").read_text())
        assert (manifest["tuner"], manifest["steps"]) == (tuner, 2)


# --- sentiment -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sentiment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("matplotlib")
    shutil.copytree(EXAMPLES / "sentiment", "sentiment", ignore=shutil.ignore_patterns("runs", "*.png"))
    monkeypatch.chdir("sentiment")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    return Path.cwd()


def test_the_commands_of_the_sentiment_task_draw_its_curve(
    sentiment: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = ["ppo.iterations=2", "ppo.batch_size=4", "ppo.response_length=6", "data.eval_size=2", "ppo.eval_every=1"]
    cut += ["train.per_device_train_batch_size=2", "train.use_cpu=true"]
    shown = commands(sentiment / "README.md")
    trained = [command for command in shown if command.startswith("alignkit ")]
    for command in trained:
        assert main([*shlex.split(command)[1:], "--model", str(tiny_model("llama")), *cut]) == 0
    (drawn,) = (shlex.split(command) for command in shown if command.startswith("python "))
    runs = [str(run) for pattern in drawn[3:] for run in sorted(Path.cwd().glob(pattern))]
    monkeypatch.setattr(sys, "argv", [*drawn[1:3], *runs])
    capsys.readouterr()
    runpy.run_path("curve.py", run_name="__main__")

    table = capsys.readouterr().out.splitlines()
    assert len(trained) == len(table) - 1 == len(runs) >= 3
    assert Path(drawn[2]).read_bytes().startswith(b"\x89PNG")


def test_a_run_of_the_sentiment_task_is_where_the_curve_says(sentiment: Path) -> None:
    spec = importlib.util.spec_from_file_location("curve", "curve.py")
    assert spec is not None
    assert spec.loader is not None
    curve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curve)
    logs = [{"kl_coef": 0.1, "kl": n, "score": n / 10} for n in range(6)]
    Path("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"eval_kl": 9}, *logs]))

    kl_coef, points = curve.points(Path())
    assert kl_coef == 0.1
    assert points == [pytest.approx(point) for point in [(0, 0), (2, 0.2), (4.5, 0.45)]]


def test_the_sentiment_reward_tells_praise_from_blame(sentiment: Path) -> None:
    score = runpy.run_path("sentiment.py")["score"]
    good, neutral, bad = score([""] * 3, ["it was wonderful.", "it has a lid.", "it was awful."])

    assert good > neutral == 0 > bad


def test_the_openings_are_prompts_and_none_is_given_twice(sentiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    openings = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]

    assert len(openings) == len(set(openings)) >= 150
    assert main(["check", "-c", "sentiment.yaml", "--trust"]) == 0
    assert f"{len(openings)} rows" in (told := capsys.readouterr().out)
    assert "format prompts" in told


# --- alignment tax ---------------------------------------------------------------------------------------------------


def test_the_commands_of_the_alignment_tax_measure_it(
    folder: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    shutil.copytree(EXAMPLES / "alignment-tax", "alignment-tax", ignore=shutil.ignore_patterns("runs", "*.jsonl"))
    monkeypatch.chdir("alignment-tax")
    cut = ["--model", str(tiny_model("llama")), "train.max_steps=2", "train.use_cpu=true"]
    online = ["ppo.batch_size=4", "ppo.response_length=6", "ppo.epochs=1", "data.eval_size=2"]
    for command in commands(EXAMPLES / "alignment-tax" / "README.md"):
        words = shlex.split(command)
        if words[:2] == ["python", "texts.py"]:
            runpy.run_path(str(EXAMPLES / "alignment-tax" / "texts.py"), run_name="__main__")
        elif words[:2] == ["alignkit", "train"]:
            assert main([*words[1:], *cut, *(online if "ppo" in words else [])]) == 0
        elif words[0] == "alignkit":
            assert main([*words[1:], "--limit", "4", *(["--max-new-tokens", "4"] if "compare" in words else [])]) == 0
    kept = json.loads(Path("runs/ptx/ppo/evaluation.json").read_text())

    assert {row["data"] for row in kept["perplexity"]} >= {"reference.jsonl", "docs.jsonl"}
    assert [(row["task"], row["metric"], row["documents"]) for row in kept["tasks"]] == [("choices", "acc", 4)]
    rows = {name: Path(f"{name}.jsonl").read_text().splitlines() for name in ("texts", "reference", "docs", "choices")}
    assert not set(rows["texts"]) & set(rows["reference"])
    assert len(rows["choices"]) == len(rows["reference"]) + len(rows["docs"])


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.fixture
def arithmetic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(EXAMPLES / "arithmetic", "arithmetic", ignore=shutil.ignore_patterns("runs", "*.jsonl"))
    monkeypatch.chdir("arithmetic")
    return Path.cwd()


def test_the_commands_of_the_arithmetic_task_run(
    arithmetic: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = ["grpo.iterations=1", "grpo.batch_size=4", "grpo.samples_per_prompt=2", "grpo.response_length=6"]
    cut += ["data.eval_size=4", "train.per_device_train_batch_size=2", "train.use_cpu=true"]
    for command in commands(arithmetic / "README.md"):
        program, *words = shlex.split(command)
        if program == "python":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
        elif program == "alignkit":
            more = ["--model", str(tiny_model("llama")), *cut] if words[0] == "train" else ["--max-new-tokens", "4"]
            assert main([*words, *more]) == 0

    assert "held-out score" in capsys.readouterr().out
    assert json.loads(Path("runs/grpo/alignkit.json").read_text())["steps"] >= 1


def test_the_answers_to_the_arithmetic_problems_are_right(arithmetic: Path) -> None:
    rows = runpy.run_path("problems.py")["problems"](300)

    assert len({row["prompt"] for row in rows}) == 300
    right = {"larger": max, "smaller": min, "+": int.__add__, "times": int.__mul__}
    seen = set()
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        (kind,) = (word for word in right if word in row["prompt"])
        seen.add(kind)
        assert int(row["answer"]) == right[kind](a, b)
    assert seen == set(right)
