"""Sampling, scoring, ranking and comparing from Python: the results of the commands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

import alignkit
from alignkit import Demonstration
from alignkit.api import row_files
from alignkit.cli import main

ROWS = [{"prompt": f"p{n}", "response": text} for n, text in enumerate(["e e e", "b", "e c"])]


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def longest(prompts: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def test_samples_are_those_of_the_command(reward_runs: Path) -> None:
    assert main(["sample", "lora/sft", "prompts.jsonl", "-o", "out.jsonl", "-k", "2", "--max-new-tokens", "6"]) == 0
    command = read("out.jsonl")

    run = alignkit.load("lora/sft")
    for prompts in ("prompts.jsonl", [row["prompt"] for row in command], read("prompts.jsonl")):
        assert alignkit.sample(run, prompts, k=2, max_new_tokens=6) == command
    assert (
        alignkit.sample(run, "prompts.jsonl", k=2, max_new_tokens=6, output="own.jsonl") == read("own.jsonl") == command
    )
    with pytest.raises(alignkit.ConfigError, match="was sampled with seed=0, not 1"):
        alignkit.sample(run, "prompts.jsonl", k=2, max_new_tokens=6, seed=1, output="own.jsonl")


def test_a_model_is_sampled_with_model_kwargs(reward_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``alignkit sample MODEL prompts.jsonl model_kwargs.KEY=VALUE`` does."""
    from transformers import AutoModelForCausalLM

    model, passed = alignkit.load("lora/sft").manifest["base"]["name"], list[Any]()
    load = AutoModelForCausalLM.from_pretrained

    def recorded(*args: Any, **kwargs: Any) -> Any:
        passed.append(kwargs.get("attn_implementation"))
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    alignkit.sample(model, ["e"], k=1, max_new_tokens=2, model_kwargs={"attn_implementation": "eager"})
    assert passed == ["eager"]
    with pytest.raises(alignkit.ConfigError, match="unknown key model_kwargs.atn_implementation. Did you mean"):
        alignkit.sample(model, ["e"], model_kwargs={"atn_implementation": "eager"})
    with pytest.raises(alignkit.ConfigError, match="lora/sft is a run, which is loaded with the model_kwargs"):
        alignkit.sample("lora/sft", ["e"], model_kwargs={"attn_implementation": "eager"})


def test_scores_are_those_of_the_command(reward_runs: Path) -> None:
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["score", "lora-a/rm", "answers.jsonl", "-o", "out.jsonl"]) == 0

    demonstrations = [
        Demonstration([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}])
        for row in ROWS
    ]
    for rows in ("answers.jsonl", ROWS, demonstrations):
        assert alignkit.score("lora-a/rm", rows) == read("out.jsonl")
    with pytest.raises(alignkit.ConfigError, match="score: lora/sft is a policy"):
        alignkit.score(alignkit.load("lora/sft"), ROWS)
    ranked = alignkit.score("lora-a/rm", [{"prompt": "p", "responses": ["e e e", "b"], "ranks": [0, 1]}])
    assert [len(row["scores"]) for row in ranked] == [2]


def test_a_reward_model_in_memory_gives_the_scores(reward_runs: Path) -> None:
    """As the model card shows, with plain Transformers."""
    import torch

    run = alignkit.load("full-a/rm")
    model, tokenizer = run.model()
    messages = [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "e e e"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    end = max(place for place, token in enumerate(ids) if token in run.manifest["stop_ids"])
    with torch.no_grad():
        score = float(model(torch.tensor([ids[: end + 1]], device=model.device)).logits)

    assert score == pytest.approx(alignkit.score(run, ROWS)[0]["score"], abs=1e-4)


def test_rankings_are_those_of_the_command(reward_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"prompt": f"p{n}", "responses": ["b", "e e e", "e c", "e e e"], "id": n} for n in range(3)]
    Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert main(["rank", "samples.jsonl", "--by", "lora-a/rm", "-o", "out.jsonl"]) == 0

    by_model = alignkit.rank(samples, alignkit.load("lora-a/rm"))
    assert by_model == alignkit.rank("samples.jsonl", "lora-a/rm") == read("out.jsonl")
    assert alignkit.rank(samples, longest) == [{**row, "ranks": [2, 0, 1, 0]} for row in samples]
    table = {"name": "function", "call": f"{__name__}:longest"}
    assert alignkit.rank(samples, table) == alignkit.rank(samples, longest)
    with pytest.raises(alignkit.ConfigError, match="by is a table without a name"):
        alignkit.rank(samples, {"call": "a:b"})
    with pytest.raises(alignkit.ConfigError, match="limit must be a whole number of 1 or more"):
        alignkit.rank(samples, longest, limit=0)
    capsys.readouterr()
    assert len(alignkit.rank(samples, longest, limit=2)) == 2
    assert "1 rows are not ranked" in capsys.readouterr().out


def test_a_comparison_is_that_of_the_command(reward_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--reward", "lora-a/rm", "--data", "prompts.jsonl", "--max-new-tokens", "6"]
    capsys.readouterr()
    assert main(["compare", "lora/sft", "full/sft", *settings, "--json"]) == 0
    command = json.loads(capsys.readouterr().out)

    runs = [alignkit.load("lora/sft"), "full/sft"]
    assert alignkit.compare(runs, reward="lora-a/rm", data="prompts.jsonl", max_new_tokens=6) == command
    by_function = alignkit.compare(runs, reward=longest, data=read("prompts.jsonl"), max_new_tokens=6)
    assert (by_function["reward"], by_function["data"]) == ("longest", "rows in memory")
    assert by_function["runs"][1]["kl"] == command["runs"][1]["kl"]
    assert by_function["runs"][0]["score"] > 0
    judged = alignkit.compare(runs, judge=longest, data="prompts.jsonl", max_new_tokens=6)
    assert judged["judge"]
    with pytest.raises(alignkit.ConfigError, match="compare needs at least two runs"):
        alignkit.compare(["lora/sft"])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (alignkit.sample, {"k": 0}, "sample: k must be a whole number of 1 or more"),
        (alignkit.sample, {"k": 2.0}, "sample: k must be a whole number"),
        (alignkit.sample, {"batch": -1}, "sample: batch must be a whole number of 1 or more"),
        (alignkit.sample, {"temperature": -1}, "sample: temperature must be a number of 0 or more"),
        (alignkit.sample, {"top_p": 2}, "sample: top_p must be a number from 0 to 1"),
        (alignkit.sample, {"seed": -1}, "sample: seed must be a whole number from 0 to 4294967295"),
        (alignkit.score, {"batch": 0}, "score: batch must be a whole number"),
        (alignkit.compare, {"limit": -1}, "compare: limit must be a whole number of 1 or more"),
        (alignkit.compare, {"temperature": 0}, "compare: temperature must be a number of 0.01 or more"),
    ],
)
def test_numbers_that_make_no_sense_are_errors(
    function: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(alignkit.ConfigError, match=message):
        function(["a", "b"], **arguments) if function is alignkit.compare else function("a", ["b"], **arguments)


def test_a_run_is_found_from_another_folder_and_not_mixed_with_a_later_one(
    reward_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = alignkit.load("lora/sft")
    random.seed(1)
    expected = random.Random(1).random()
    monkeypatch.chdir("full")
    assert run.model().model is not None
    assert random.random() == expected  # the session's random numbers are its own
    run.manifest["steps"] += 1
    with pytest.raises(alignkit.ConfigError, match="has changed since it was opened"):
        run.model()


def test_an_export_is_that_of_the_command(reward_runs: Path) -> None:
    assert main(["export", "lora/sft", "--to", "command", "--dtype", "float32"]) == 0
    exported = alignkit.export(alignkit.load("lora/sft"), "python", dtype="float32")

    assert exported.folder == Path("python")
    assert exported.kl < 1e-6
    files = [Path(folder, "model.safetensors").read_bytes() for folder in ("command", "python")]
    assert files[0] == files[1]
    with pytest.raises(alignkit.ConfigError, match="'10' is not a size"):
        alignkit.export("lora/sft", "other", max_shard_size=10)  # type: ignore[arg-type]
    with pytest.raises(alignkit.ConfigError, match="export: python exists"):
        alignkit.export("lora/sft", "python")


def test_a_table_is_not_taken_for_prompts() -> None:
    """Iterating over it gives the names of its columns."""
    table = {"prompt": ["What is 2?"]}
    for rows in (pandas.DataFrame(table), table):
        with pytest.raises(alignkit.DataError, match="Pass a list"), row_files.path_for(rows):
            pass
    with row_files.path_for({"path": "prompts.jsonl"}) as path:
        assert path == "prompts.jsonl"
