"""Runs whose ``data.path`` is a list: what they train on, record, resume and are compared by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import record

from alignkit.cli import main
from alignkit.cli.common import read_arguments
from alignkit.evaluation import comparison
from alignkit.runs import lineage, up_to_date
from alignkit.runs.plan import pipeline

PAIRS = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(6)]
RANKINGS = [{"prompt": f"p{n}", "responses": ["a", "bb", "ccc"], "ranks": [0, 1, 2]} for n in range(4)]
DEMOS = [{"prompt": f"d{n}", "completion": "yes"} for n in range(12)]
MIXED = "[{path: pairs.jsonl, weight: 2}, rankings.jsonl]"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    for name, rows in (("pairs", PAIRS), ("rankings", RANKINGS), ("demos", DEMOS), ("demos-2", DEMOS[4:])):
        write(f"{name}.jsonl", rows)
    return tmp_path


@pytest.fixture
def given(tiny_model: Callable[..., Path]) -> list[str]:
    return ["--model", str(tiny_model()), "train.use_cpu=true", "train.per_device_train_batch_size=1"]


def test_a_reward_model_of_two_rounds(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch has each pair twice and each ranking once. The run is recognized, and a resume extends it."""
    once = ["train.num_train_epochs=1", "train.save_strategy=steps", "train.save_steps=8", "data.eval_size=0"]
    command = ["train", "--plugin", "rm", "rm.policy=base", *given, *once, f"rm.data.path={MIXED}"]
    assert main(command) == 0
    manifest = record(Path("runs/rm"))
    assert manifest["steps"] == 6 * 2 + 4
    assert [(s["path"], s["format"], s["rows"], s["weight"]) for s in manifest["data"]["sources"]] == [
        ("pairs.jsonl", "preference", 6, 2),
        ("rankings.jsonl", "ranking", 4, 1),
    ]
    assert "16 rows of `pairs.jsonl, rankings.jsonl`" in Path("runs/rm/README.md").read_text()

    assert main(command) == 0
    assert "nothing to train" in capsys.readouterr().out
    another = [word.replace("weight: 2", "weight: 3") for word in command]
    assert main([*another, "--resume"]) == 2
    assert "rm.data.path was [{'path': 'pairs.jsonl', 'weight': 2.0}, 'rankings.jsonl']" in capsys.readouterr().err
    assert main([*command, "--resume", "train.num_train_epochs=1.5"]) == 0
    assert "resuming from step 16" in capsys.readouterr().out
    assert record(Path("runs/rm"))["steps"] == 24

    write("rankings.jsonl", RANKINGS[1:])
    run = lineage.named("", "runs/rm", "reward")
    plan = pipeline(*read_arguments(["rm"], None, str(given[1]), [], "elsewhere", command[6:])).to_train[-1]
    from alignkit.data.sources import fingerprints

    reasons = up_to_date.differences(run, plan.config, fingerprints(plan.config.data))
    assert "rankings.jsonl has changed" in reasons
    assert "pairs.jsonl has changed" not in reasons


def run_of(stage: str, *arguments: str) -> Any:
    from alignkit.training.run import Run

    return Run(
        pipeline(*read_arguments([stage], None, arguments[1], [], None, list(arguments[2:]))).to_train[-1], print
    )


def test_pairs_that_a_weight_repeats_are_not_merged_into_one_ranking(given: list[str]) -> None:
    """``a > b`` and ``a > c`` of one prompt are a ranking of three answers, which the weight repeats."""
    from alignkit_rm.groups import encode_groups

    write("pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": rejected} for rejected in "bc"])
    write("rankings.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "d"}])
    run = run_of("rm", *given, "rm.policy=base", "data.eval_size=0", f"rm.data.path={MIXED}")

    groups = encode_groups(run, run.train_rows, 512, "error")
    assert sorted(len(group.branches.answers) for group in groups) == [3, 4]


def test_a_prompt_is_sampled_as_often_as_its_weight_says(given: list[str]) -> None:
    """Equal prompts of one epoch are one prompt, but a weight repeats it."""
    from alignkit.online.prompts import encode_prompts

    write("pairs.jsonl", [*PAIRS[:2], {**PAIRS[0], "chosen": "better"}])
    Path("scores.py").write_text("def length(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    reward = ["ppo.reward.name=function", "ppo.reward.call=scores:length", "data.eval_size=0"]
    run = run_of("ppo", *given, "ppo.policy=base", *reward, f"ppo.data.path={MIXED}")

    sampled = sorted(str(prompt.messages[0]["content"]) for prompt in encode_prompts(run, run.train_rows))
    assert sampled == ["p0", "p1", "p2", "p3", "q0", "q0", "q1", "q1"]


def test_the_rows_of_a_parent_are_those_of_all_its_sources(given: list[str]) -> None:
    path = "sft.data.path=[{path: demos.jsonl, weight: 2}, demos-2.jsonl]"
    assert main(["train", "--plugin", "sft", *given, path, "train.max_steps=1", "data.eval_size=2"]) == 0
    run = run_of("rm", *given, "rm.data.path=pairs.jsonl", "rm.policy=runs/sft")

    assert len(run.parent_rows("policy")) == 2 * 12 + 8

    runs = [lineage.named("", "runs/sft", "policy")]
    questions = comparison.prompts_of(None, runs, 100)
    held_out = {prompt[0]["content"] for prompt in questions.prompts}
    assert not questions.unknown
    assert 2 <= len(held_out) <= 4
    assert comparison.prompts_of("demos.jsonl", runs, 100).trained_on == 12 - len(held_out)
