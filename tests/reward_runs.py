"""Reward models to score with, and the fixture that trains them once; ``conftest.py`` registers it for all tests."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import Answers
from alignkit.cli import main
from alignkit.cli.common import read_arguments
from alignkit.runs.plan import pipeline
from alignkit.testing import DEMONSTRATIONS

PROMPTS = [f"p{n}" for n in range(8)]
TEXTS = ["e e e", "b", "e c", "b b b b e", "c", "e", "b c e", "c c"]


def write(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def trained_reward_runs(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an SFT run and two reward runs of each of lora and full."""
    folder, here = tmp_path_factory.mktemp("rewards"), Path.cwd()
    os.chdir(folder)
    try:
        shutil.copytree(tiny_model(), "base")
        write("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
        write("demos.jsonl", DEMONSTRATIONS)
        ranks = {"a": [0, 2, 1], "b": [2, 0, 1]}
        for which, of in ranks.items():
            rows = [{"prompt": f"p{n}", "responses": ["e e e", "b", "e c"], "ranks": of} for n in range(12)]
            write(f"{which}.jsonl", rows)
        for tuner in ("lora", "full"):
            common = ["--plugin", tuner, "--model", "base", "train.use_cpu=true", "train.max_steps=8"]
            common += ["train.learning_rate=0.003", "train.bf16=false", "data.eval_size=2"]
            assert main(["train", "--plugin", "sft", "--data", "demos.jsonl", "--output", tuner, *common]) == 0
            for which in ranks:
                output = ["--output", f"{tuner}-{which}"]
                given = ["--data", f"{which}.jsonl", f"rm.policy={tuner}/sft", *output]
                assert main(["train", "--plugin", "rm", *given, *common]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def reward_runs(trained_reward_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of the test's own, beside links to what is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    for each in trained_reward_runs.iterdir():
        Path(each.name).symlink_to(each)
    return tmp_path


def run_of(tuner: str, *settings: str) -> Any:
    """A PPO run that is ready to train, and its reward, which is given the run's roles."""
    from alignkit.models import assemble
    from alignkit.training.run import Run

    given = [f"ppo.policy={tuner}/sft", "train.bf16=false", "train.use_cpu=true", "data.eval_size=2", *settings]
    run = Run(
        pipeline(*read_arguments(["ppo", tuner], None, "base", ["prompts.jsonl"], "out", given)).to_train[-1], print
    )
    score = run.reward()
    roles = assemble(run, value="adapter", temperature=1.0).eval()
    return run, functools.partial(score, roles=roles)


def answers_of(run: Any) -> Answers:
    from alignkit.data.chat_template import encode_answer

    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    encoded = [encode_answer(run.tokenizer, *both, run.stop_ids) for both in zip(prompts, TEXTS, strict=True)]
    return Answers(prompts, TEXTS, [ids[:start] for ids, start in encoded], [ids[start:] for ids, start in encoded])


def plain_scores(folder: str, answers: Answers) -> list[float]:
    """The scores by plain Transformers and PEFT, an answer at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if Path(folder, "adapter_config.json").exists():
        base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)
        model = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = [a + b for a, b in zip(answers.prompt_ids, answers.answer_ids, strict=True)]
        return [model(torch.tensor([row])).logits.item() for row in ids]


def refused(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """What stops the plan, in which SFT and the reward model would be trained first."""
    capsys.readouterr()
    given = ["--model", "base", "--data", "prompts.jsonl", "--output", "new", *settings]
    assert main(["train", "--plugin", "ppo", "--plan", *given]) == 2
    return capsys.readouterr().err
