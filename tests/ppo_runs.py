"""Runs of PPO on tiny models: settings, and fixtures that ``conftest.py`` registers for all tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit import PolicyBatch
from alignkit.cli import main
from alignkit.models import Roles

PROMPTS = [{"prompt": f"What is {n} and one?"} for n in range(12)]
ONES = torch.ones(1, 3, dtype=torch.bool)


def policy_batch(ratio: list[float], advantages: list[float], values: list[float], returns: list[float]) -> PolicyBatch:
    n = len(ratio)
    return PolicyBatch(
        logps=torch.tensor([ratio]).log(),
        old_logps=torch.zeros(1, n),
        advantages=torch.tensor([advantages]),
        values=torch.tensor([values]),
        old_values=torch.zeros(1, n),
        returns=torch.tensor([returns]),
        entropy=torch.full((1, n), 2.0),
        mask=torch.ones(1, n, dtype=torch.bool),
        num_tokens=n,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> Path:
    """A working folder with prompts, and a module of rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    Path("gold.py").write_text(
        "def letters(prompts, answers):\n    return [answer.count('e') / 4 for answer in answers]\n"
        "def broken(prompts, answers):\n    raise KeyError('oh')\n"
        "def few(prompts, answers):\n    return [0.5]\n"
        "def nan(prompts, answers):\n    return [float('nan')] * len(answers)\n"
    )
    shutil.copytree(tiny_model(), "base")
    return tmp_path


SMALL = [
    *("--model", "base", "--data", "prompts.jsonl", "--output", "runs", "data.eval_size=4", "train.use_cpu=true"),
    *("ppo.batch_size=8", "ppo.minibatches=2", "ppo.response_length=12", "ppo.eval_every=2", "ppo.save_every=1"),
    *("train.per_device_train_batch_size=2", "train.learning_rate=1e-3", "train.bf16=false"),
]
GOLD = ["ppo.policy=base", "reward.name=function", "reward.call=gold:letters"]


def ppo(*arguments: str) -> Path:
    assert main(["--debug", "train", "--plugin", "ppo", *SMALL, *arguments]) == 0
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs"
    return Path(output) / "ppo"


def logs(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def iterations(run: Path) -> list[dict[str, Any]]:
    return [line for line in logs(run) if "seconds_sampling" in line]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in run.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def below(folder: Path) -> Callable[[str], list[str]]:
    """``below("lora")``: an SFT and a reward run of that tuner, and the arguments that name them."""
    from conftest import DEMONSTRATIONS

    rows = [{"prompt": f"p{n}", "responses": ["e e e", "b", "e c"], "ranks": [0, 2, 1]} for n in range(12)]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    Path("rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(tuner: str) -> list[str]:
        common = ["--plugin", tuner, "--model", "base", "--output", f"below-{tuner}", "train.use_cpu=true"]
        common += ["train.max_steps=8", "train.learning_rate=0.003", "train.bf16=false", "data.eval_size=2"]
        assert main(["train", "--plugin", "sft", "--data", "demos.jsonl", *common]) == 0
        assert main(["train", "--plugin", "rm", "--data", "rankings.jsonl", *common]) == 0
        return ["--plugin", tuner, f"ppo.policy=below-{tuner}/sft", f"reward.path=below-{tuner}/rm"]

    return make


LEARN = [
    *(*GOLD, "--plugin", "full", "ppo.batch_size=32", "ppo.response_length=8", "train.per_device_train_batch_size=16"),
    *("train.learning_rate=3e-3", "ppo.eval_every=99", "ppo.save_every=99", "ppo.missing_eos_penalty=0"),
]


def roles_of(arguments: list[str]) -> tuple[Any, Roles]:
    """A run and its roles, in fp32, as the stage makes them."""
    from alignkit.cli.common import read_arguments
    from alignkit.models import assemble
    from alignkit.runs.plan import pipeline
    from alignkit.training.run import Run

    plugins = ["ppo", *(a for a in arguments if a in ("full", "lora", "qlora"))]
    settings = [a for a in arguments if "=" in a]
    asked = read_arguments(plugins, None, "base", ["prompts.jsonl"], "runs", [*settings, "train.bf16=false"])
    run = Run(pipeline(*asked).to_train[-1], print)
    roles = assemble(run, value="adapter", temperature=1.0).eval()
    return run, roles.cpu()  # as a trainer does: bitsandbytes loads 4-bit weights onto a GPU if there is one
