"""Fixtures that train a small run of one stage in this process; ``conftest.py`` registers them for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.cli import main

RANKINGS = [
    {
        "prompt": f"What is {n} and one?",
        "responses": ["Count on!", f"It is {n + 1}. Count on!", f"{n + 1}", "No idea. " * (n % 3 + 1)][: n % 3 + 2],
        "ranks": [2, 0, 1, 2][: n % 3 + 2],
    }
    for n in range(16)
]


@pytest.fixture
def train_rm(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``train_rm("--plugin", "lora")``: a reward run of a tiny model in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*arguments: str, model: str = "llama", output: str = "out", rows: Any = RANKINGS) -> Path:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "rm", "--model", str(tiny_model(model)), "--output", str(tmp_path / output)]
        if not any("rm.policy" in argument or "--config" in argument for argument in arguments):
            given.append("rm.policy=base")
        small = ["train.per_device_train_batch_size=2", "data.eval_size=4", "train.use_cpu=true"]
        assert main(["--debug", "train", *given, "--data", str(data), *small, *arguments]) == 0
        return tmp_path / output / "rm"

    return run


@pytest.fixture
def dpo_command(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """``dpo_command("train.max_steps=1")``: the words of a small DPO run of a tiny model."""

    def words(*more: str, model: str = "llama", output: str = "out", rows: Any = RANKINGS) -> list[str]:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "dpo", "--model", str(tiny_model(model)), "--output", str(tmp_path / output)]
        given += ["--data", str(data), "train.per_device_train_batch_size=2", "train.use_cpu=true"]
        given += ["data.eval_size=4", "dpo.response_length=4"]
        base = [] if any("dpo.policy" in argument for argument in more) else ["dpo.policy=base"]
        return [*given, *base, *more]

    return words


@pytest.fixture
def train_dpo(dpo_command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``train_dpo("--plugin", "lora")``: a DPO run in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*more: str, output: str = "out", **others: Any) -> Path:
        assert main(["--debug", "train", *dpo_command(*more, output=output, **others)]) == 0
        return tmp_path / output / "dpo"

    return run


@pytest.fixture
def dpo_trainer(dpo_command: Callable[..., list[str]]) -> Callable[..., Any]:
    """``dpo_trainer("--plugin", "lora")``: the trainer of a DPO run, not yet trained."""
    return lambda *more, **others: trainer_of(dpo_command(*more, **others))


@pytest.fixture
def kto_command(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """``kto_command("train.max_steps=1")``: the words of a small KTO run of a tiny model."""

    def words(*more: str, output: str = "out", rows: Any = RANKINGS) -> list[str]:
        data = tmp_path / "ratings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "kto", "--model", str(tiny_model()), "--output", str(tmp_path / output)]
        given += ["--data", str(data), "train.per_device_train_batch_size=4", "train.use_cpu=true"]
        given += ["data.eval_size=4", "kto.response_length=4"]
        base = [] if any("kto.policy" in argument for argument in more) else ["kto.policy=base"]
        return [*given, *base, *more]

    return words


@pytest.fixture
def train_kto(kto_command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``train_kto("--plugin", "lora")``: a KTO run in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*more: str, output: str = "out", **others: Any) -> Path:
        assert main(["--debug", "train", *kto_command(*more, output=output, **others)]) == 0
        return tmp_path / output / "kto"

    return run


@pytest.fixture
def kto_trainer(kto_command: Callable[..., list[str]]) -> Callable[..., Any]:
    """``kto_trainer("--plugin", "lora")``: the trainer of a KTO run, not yet trained."""
    return lambda *more, **others: trainer_of(kto_command(*more, **others))


def trainer_of(words: list[str]) -> Any:
    """The trainer of the run that the words of a command describe, not yet trained."""
    from alignkit.cli.common import read_arguments
    from alignkit.runs.plan import pipeline
    from alignkit.training.run import Run

    flags, overrides, plugins = dict[str, str](), list[str](), list[str]()
    while words:
        word = words.pop(0)
        if word == "--plugin":
            plugins.append(words.pop(0))
        elif word.startswith("--"):
            flags[word] = words.pop(0)
        else:
            overrides.append(word)
    asked = read_arguments(plugins, None, flags["--model"], [flags["--data"]], flags["--output"], overrides)
    run = Run(pipeline(*asked).to_train[-1], print)
    run.folder.mkdir(parents=True, exist_ok=True)
    return run.config.stage.component.build(run)


@pytest.fixture
def sgd(install: Callable[..., None]) -> None:
    """An optimizer whose step is the gradient, so that equal steps mean equal gradients."""
    install(
        "sgd",
        """
        from alignkit import Optimizer, hookimpl

        def build(config, args):
            import torch
            return torch.optim.SGD, {"lr": args.learning_rate}

        @hookimpl
        def alignkit_optimizer():
            return [Optimizer(name="sgd", summary="plain gradient descent", build=build)]
        """,
    )
