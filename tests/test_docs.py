"""Every command and every config that the README, the docs and the examples show is run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
from chat_servers import ScriptedServer
from conftest import DEMONSTRATIONS
from label_pages import label_all

from alignkit import bundled
from alignkit.cli import launch, main
from alignkit.runs import sweep_training
from alignkit.runs.sweep import Job

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("first-plugin.md", "second-round.md")  # pages with tests of their own
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in ELSEWHERE)]
SHORT = ["train.max_steps=1", "data.eval_size=2", "train.per_device_train_batch_size=1"]

ONLINE = ("ppo", "grpo", "rloo")
SHORT_ONLINE = ["batch_size=4", "minibatches=1", "response_length=8"]


def write_data() -> None:
    """The files of data that pages name."""
    rankings = [{"prompt": f"p{n}", "responses": ["a", "b b", "c"], "ranks": [0, 1, 1]} for n in range(8)]
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b b"} for n in range(8)]
    ratings = [{"prompt": f"q{n}", "completion": "a" * (n + 1), "label": n % 2 == 0} for n in range(24)]
    prompts = [{"prompt": f"What is {n} and one?"} for n in range(3)]
    texts = [{"text": f"It rained for {n} days."} for n in range(4)]
    files = {
        "texts": texts,
        "demos": DEMONSTRATIONS,
        "rankings": rankings,
        "preferences": pairs,
        "ratings": ratings,
        "prompts": prompts,
    }
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(page: Path) -> None:
    """The files whose content ``docs/evaluate.md`` shows."""
    for language in ("yml", "jsonl"):
        for number, content in enumerate(blocks(page, language)):
            assert number == 0
            Path("capitals.yaml" if language == "yml" else "capitals.jsonl").write_text(content)


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def train_here(job: Job, say: Callable[[str], None]) -> str | None:
    """A run of a sweep in this process."""
    return "failed" if main(sweep_training.arguments_of(job)) else None


def cache_of_exports(folder: Path) -> Path:
    """An empty cache but for the bundled model, so that this machine's cache gets no exports of tests."""
    cache = folder / "exports"
    if not cache.exists():
        cache.mkdir()
        (cache / "smollm2-135m").symlink_to(bundled.model("bundled:smollm2-135m"))
    return cache


def test_every_command_is_one_that_these_tests_or_ci_run() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    elsewhere = ("make demo", "make test", "pip install", "git clone", "cd alignkit")  # .ci/run does what these do

    assert len(shown) > 10
    assert all(command.startswith(("alignkit ", *elsewhere)) for command in shown), shown


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_commands_of_a_page_run_in_their_order(
    page: Path,
    tiny_model: Callable[..., Path],
    small_bundled: Path,
    chat_server: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As written, but training is cut to one step, in this process; models, servers and labelers are those of tests.

    The bundled model is one of the same kind with few weights: ``make demo`` trains the real one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    monkeypatch.setenv("ALIGNKIT_CACHE", str(small_bundled))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # for verdicts
    monkeypatch.setattr(sweep_training, "_run", train_here)
    monkeypatch.setattr(launch, "start", lambda command, *_: main(command))  # tests/test_launch.py starts processes
    write_data()
    write_files(page)
    for command in commands(page):
        if not command.startswith("alignkit "):
            continue
        command, _, target = command.partition(" > ")
        arguments = shlex.split(command)[1:]
        arguments = [re.sub(r"Qwen/[\w.-]+", str(tiny_model("qwen2")), argument) for argument in arguments]
        arguments = [argument.replace("http://localhost:8000/v1", chat_server.url) for argument in arguments]
        if arguments[0] in ("train", "sweep", "launch"):
            stage = next((name for name in ONLINE if name in arguments), "")
            arguments += [*SHORT, *(f"{stage}.{setting}" for setting in SHORT_ONLINE if stage)]
            own_reward = any(argument.startswith(("reward.name", "reward.path")) for argument in arguments)
            arguments += ["rm.normalise_on=8"] if "rm" in arguments or (stage and not own_reward) else []
            arguments += [f"{name}.response_length=8" for name in ("dpo", "kto", "rahf") if name in arguments]
            arguments += ["train.max_steps=2"] if "rahf" in arguments else []
            arguments += ["train.per_device_train_batch_size=2"] if "kto" in arguments else []
        if arguments[0] == "sweep":  # two values of the first setting, and one of the second
            arguments = [argument.replace(",0.1", "").replace("=1,2,3", "=1") for argument in arguments]
        samples = arguments[0] == "sample" or (arguments[0] == "label" and "--prompts" in arguments)
        if samples or arguments[0] in ("chat", "compare"):  # shorter random answers are all ranked alike
            arguments += ["--max-new-tokens", "32" if samples else "8"]
        if arguments[0] in ("evaluate", "compare"):
            arguments += ["--limit", "4"]
        if arguments[0] == "serve":  # tests/test_serve.py starts servers
            monkeypatch.setenv("ALIGNKIT_CACHE", str(cache_of_exports(tmp_path)))
            arguments.insert(1, "--print")
        if arguments[0] == "label" and not {"--export", "--status"} & set(arguments):
            label_all(arguments)
            continue
        assert main(arguments) == 0, command
        output = capsys.readouterr().out
        if target:
            Path(target).write_text(output)


def test_the_loss_that_the_readme_shows_trains(train: Callable[..., Path], install: Callable[..., None]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    install("focal", code)

    manifest = json.loads((train("--plugin", "focal", "train.max_steps=1") / "alignkit.json").read_text())
    assert manifest["loss"] == "focal"


@pytest.mark.parametrize(
    "command",
    [
        "sft_vs_trl.py --runs 1 --steps 3 --model TINY",
        "rm_vs_trl.py --k 3 --groups 8 --held-out 2 --runs 1 --model TINY",
        "dpo_vs_trl.py --even --runs 1 --steps 3 --batch-size 2 --model TINY",
        "kto_vs_trl.py --runs 1 --steps 3 --batch-size 2 --model TINY",
        "ppo_vs_trl.py --runs 1 --iterations 2 --batch-size 4 --minibatches 2 --response-length 8 "
        "--samples-per-prompt 2 --prompt-length 90 --model TINY",
        "grpo_vs_trl.py --even --runs 1 --iterations 2 --batch-size 4 --minibatches 2 --microbatch 2 "
        "--response-length 8 --samples-per-prompt 2 --model TINY",
        "decode.py --engines generate decode --rows 4 --new-tokens 4 --runs 1 --model TINY",
        "ppo_memory.py --shapes tiny --length 64 --response 8 --sampled 4",
        "scale.py --runs 1 --stages sft --steps 3 --batch-size 4 --shard fsdp2 --model TINY",
        "start_up.py --runs 1",
        "export.py --tuners lora --dtypes bfloat16 --steps 1 --model TINY",
        "label.py --items 6 --k 3 --words 5 --labels 2",
        "frontier.py OUT --methods ppo --seeds 1 --iterations 2 --batch-size 8 --response-length 4 --answers 2 "
        "--points 2 --samples 2 --model TINY",
    ],
    ids=lambda command: command.partition(" ")[0],
)
def test_benchmarks_run(
    command: str,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = train("--plugin", "full", "train.max_steps=1")  # a model with a chat template, which plain TRL needs
    script, *arguments = command.replace("TINY", str(tiny)).replace("OUT", str(tmp_path / "frontier")).split()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / script), *arguments])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(subprocess, "run", processes.forked)  # its processes are those of a user but for imports
    runpy.run_path(sys.argv[0], run_name="__main__")

    printed = capsys.readouterr().out
    assert any(text in printed for text in ("median", "of import torch", "computed", "at a KL", "agreement"))


CONFIGS = [pytest.param(text, id=f"{page.stem}-{i}") for page in PAGES for i, text in enumerate(blocks(page, "yaml"))]


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_check_and_train(
    text: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    write_data()
    Path("run.yaml").write_text(text)
    stage = "rm" if "rm:" in text else "sft"
    words = ["-c", "run.yaml", "--plugin", stage]

    assert main(["check", *words]) == 0
    on_cpu = [] if "paged" not in text else ["optimizer.name=adamw_8bit"]
    assert main(["train", *words, "--model", str(tiny_model("qwen2")), *on_cpu, *SHORT]) == 0
