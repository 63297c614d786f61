"""``docs/second-round.md``, run as it is written, and the rounds that manifests record."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import record
from test_docs import ROOT, SHORT, blocks, commands, write_data

from alignkit.cli import main
from alignkit.components import Stage
from alignkit.registry import Registry
from alignkit.runs import fingerprints, rounds

SHORT_PPO = ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=8"]
PAGE = ROOT / "docs" / "second-round.md"


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def origins(folder: str) -> list[list[Any]]:
    sources = record(Path(folder))["data"]["sources"]
    return [[os.path.relpath(origin["model"]) for origin in source["sampled_from"]] for source in sources]


def parents(folder: str) -> dict[str, str]:
    return {role: os.path.relpath(parent["folder"]) for role, parent in record(Path(folder))["parents"].items()}


def test_the_page_does_two_rounds_and_the_manifests_tell_them_apart(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    write_data()
    (config,), (taste,) = blocks(PAGE, "yaml"), blocks(PAGE, "python")
    Path("run.yaml").write_text(config.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny_model("qwen2"))))
    Path("taste.py").write_text(taste)
    table = next(line for line in PAGE.read_text().split("\n\n") if "| `round` |" in line).splitlines()[2:]
    for command in commands(PAGE):
        arguments = shlex.split(command)[1:]
        small = {"train": [*SHORT, *SHORT_PPO, "train.use_cpu=true"] if "ppo" in arguments else [*SHORT], "rank": []}
        assert main([*arguments, *small.get(arguments[0], ["--max-new-tokens", "8"])]) == 0, command
    assert "runs/round-2/ppo" in capsys.readouterr().out

    for line in table:
        folder, number, of, answers = (cell.strip() for cell in line.strip("|").split("|"))
        folder = folder.strip("`")
        assert record(Path(folder))["round"] == int(number), folder
        assert ", ".join(f"{role} `{path}`" for role, path in parents(folder).items()) == of
        sampled_from = [f"`{model}`" for models in origins(folder) for model in models]
        assert ", ".join(sampled_from) == answers
    assert origins("runs/round-2/rm") == [[], ["runs/round-1/ppo"]]
    assert "Round 2 of feedback: policy `" in Path("runs/round-2/ppo/README.md").read_text()
    assert f"answers sampled from `{tmp_path}/runs/round-1/ppo`." in Path("runs/round-2/rm/README.md").read_text()

    for file in ("samples.jsonl", "rankings-2.jsonl"):
        assert [row["sampled_from"] for row in read(file)] == [
            {
                "model": str(tmp_path / "runs/round-1/ppo"),
                "weights": fingerprints.weights(tmp_path / "runs/round-1/ppo"),
                "round": 2,
                "max_new_tokens": 8,
                "temperature": 1.0,
                "top_p": 1.0,
                "seed": 0,
            }
        ] * 3
    for given in (["runs/round-2/ppo"], ["runs/round-1/ppo", "--temperature", "0.5"]):
        words = [given[0], "prompts.jsonl", "-o", "samples.jsonl", "-k", "4", "--max-new-tokens", "8", *given[1:]]
        before = Path("samples.jsonl").read_bytes()
        assert main(["sample", *words]) == 2
        name = "model" if len(given) == 1 else "temperature"
        assert f"samples.jsonl line 1 was sampled with {name}=" in capsys.readouterr().err
        assert Path("samples.jsonl").read_bytes() == before


def stage(name: str) -> Stage:
    registry = Registry()
    registry.activate(name)
    return registry.stage(name)


def run(name: str, number: int, **more: Any) -> dict[str, Any]:
    own = stage(name)
    return {"role": own.role, "round": number, "feedback": rounds.uses_feedback(own), "parents": {}, **more}


@pytest.mark.parametrize(
    ("name", "parents", "sampled", "number"),
    [
        ("sft", {}, [], 1),
        ("rm", {"policy": run("sft", 1)}, [], 1),
        ("rm", {"policy": run("sft", 1)}, [1], 1),
        ("rm", {"policy": run("sft", 1)}, [1, 3], 3),
        ("ppo", {"policy": run("sft", 1), "reward": run("rm", 2)}, [], 2),  # InstructGPT's: from SFT each round
        ("ppo", {"policy": run("ppo", 1), "reward": run("rm", 1)}, [], 2),
        ("ppo", {"policy": run("sft", 1), "reward": run("rm", 1)}, [3], 1),  # the answers of its rows are not used
        ("dpo", {"policy": run("sft", 1)}, [], 1),
        ("dpo", {"policy": run("dpo", 1)}, [2], 2),
        ("sft", {"policy": run("ppo", 2)}, [], 3),  # demonstrations on top of a trained policy
    ],
)
def test_the_round_of_a_run(name: str, parents: dict[str, Any], sampled: list[int], number: int) -> None:
    assert rounds.of(stage(name), parents, [{"round": each} for each in sampled]) == number


def test_manifests_of_earlier_versions_have_rounds_too() -> None:
    sft, ppo = {"role": "policy", "parents": {}}, {"role": "policy", "parents": {"policy": {}, "reward": {}}}
    assert (rounds.after(None), rounds.after(sft), rounds.after(ppo)) == (1, 1, 2)
    assert rounds.of(stage("ppo"), {"policy": ppo, "reward": {"role": "reward", "parents": {}}}, []) == 2
