"""Sampling, scoring, ranking and comparing from Python: the results of the commands."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import alignkit
from alignkit import Demonstration, Judge
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
    with pytest.raises(alignkit.ConfigError, match="limit must be 1 or more"):
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignkit.sample("run", ["a"], k=0), "k must be 1 or more"),
        (lambda: alignkit.sample("run", ["a"], k=2.0), "k must be a whole number"),  # type: ignore[arg-type]
        (lambda: alignkit.sample("run", ["a"], k=True), "k must be a whole number"),
        (lambda: alignkit.sample("run", ["a"], batch=-1), "batch must be 1 or more"),
        (lambda: alignkit.sample("run", ["a"], max_new_tokens=0), "max_new_tokens must be 1 or more"),
        (lambda: alignkit.sample("run", ["a"], temperature=-1), "temperature must be 0 or more"),
        (lambda: alignkit.sample("run", ["a"], temperature=float("nan")), "temperature must be a number"),
        (lambda: alignkit.sample("run", ["a"], top_p=0), "top_p must be between 0.01 and 1"),
        (lambda: alignkit.sample("run", ["a"], top_p=2), "top_p must be between 0.01 and 1"),
        (lambda: alignkit.sample("run", ["a"], seed=-1), "seed must be between 0 and 2147483647"),
        (lambda: alignkit.compare(["a", "b"], limit=-1), "limit must be 1 or more"),
        (lambda: alignkit.compare(["a", "b"], max_new_tokens=0), "max_new_tokens must be 1 or more"),
        (lambda: alignkit.compare(["a", "b"], batch=0), "batch must be 1 or more"),
        (lambda: alignkit.compare(["a", "b"], temperature=0), "temperature must be 0.01 or more"),
        (lambda: alignkit.compare(["a", "b"], seed=2**40), "seed must be between 0 and 2147483647"),
        (lambda: alignkit.score("run", [], batch=0), "batch must be 1 or more"),
        (lambda: alignkit.rank([], longest, batch=0), "batch must be 1 or more"),
        (lambda: alignkit.rank([], longest, limit=0), "limit must be 1 or more"),
        (lambda: alignkit.plan("sft", processes=0), "processes must be 1 or more"),
        (lambda: alignkit.plan("sft", device="gpu"), "device must be 'cuda' or 'cpu'"),  # type: ignore[arg-type]
    ],
)
def test_an_argument_out_of_its_limits_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(alignkit.ConfigError, match=message):
        call()


@pytest.mark.parametrize("option", ["--seed=-1", "--seed=4294967296", "--top-p=0"])
def test_the_commands_have_the_limits_too(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run", "prompts.jsonl", "-o", "out.jsonl", option]) == 2
    assert "Input should be" in capsys.readouterr().err


def test_judges_in_memory_compare(reward_runs: Path) -> None:
    judge = Judge(
        name="shortest",
        summary="a test",
        build=lambda config, run: lambda questions: ([len(text) for text in each.answers] for each in questions),
        largest=lambda config: None,
        order_matters=False,
    )
    runs, settings = ["lora/sft", "full/sft"], {"data": ["p0", "p1"], "reward": longest, "max_new_tokens": 6}
    for given, name in ((judge, "shortest"), (longest, "longest")):
        assert alignkit.compare(runs, judge=given, **settings)["judge"] == name  # type: ignore[arg-type]


def test_sampling_leaves_the_random_states_of_the_session(reward_runs: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    (row,) = alignkit.sample("lora/sft", ["e", "e"], k=1, max_new_tokens=2)

    assert drawn() == expected
    assert row["prompt"] == "e"


def test_a_run_is_found_after_a_change_of_the_current_folder(
    reward_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = alignkit.load("full/sft")
    assert run.folder == Path("full/sft")
    monkeypatch.chdir("/")

    assert run.folder == reward_runs / "full/sft"
    assert run.model().model.config.vocab_size


def test_a_run_does_not_load_the_weights_of_another_one_in_its_place(reward_runs: Path) -> None:
    Path("runs").mkdir()
    shutil.copytree("full/sft", "runs/sft")
    run = alignkit.load("runs/sft")
    file = Path("runs/sft/alignkit.json")
    file.write_text(json.dumps({**run.manifest, "finished": "2020-01-01T00:00:00Z"}))

    for call in (run.model, run.answers):
        with pytest.raises(alignkit.ConfigError, match=r"runs/sft has been trained again.*alignkit.load\('runs/sft'\)"):
            call()
