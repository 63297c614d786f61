"""Models of the hub: revisions, private and gated ones, without a network, and what is sent where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file, save_file

from alignkit.runs import manifest

V1, V2 = "a" * 40, "b" * 40  # commits


class Session:
    """The results of commands that ran in one process with its own cache of the hub."""

    def __init__(self, results: dict[str, Any], addresses: list[str], folder: Path) -> None:
        self.results, self.addresses, self.folder = results, addresses, folder

    def error(self, name: str) -> str:
        """The error of a command, which has to be one line."""
        result = self.results[name]
        assert result["status"] == 2, result
        assert result["err"].count("\n") == 1, result["err"]
        return str(result["err"]).strip()

    def record(self, run: str) -> dict[str, Any]:
        """The manifest of a run."""
        return manifest.read(self.folder / run)


@pytest.fixture(scope="module")
def session(
    hub_server: HubServer, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Session:
    """A model at two revisions: ``v1``, and ``main`` with other weights; a private and a gated one."""
    folder = tmp_path_factory.mktemp("hub")
    newer = folder / "newer"
    shutil.copytree(tiny_model("llama"), newer)
    save_file({n: t + 0.5 for n, t in load_file(newer / "model.safetensors").items()}, newer / "model.safetensors")
    hub_server.repositories |= {
        "acme/tiny": {"v1": (V1, tiny_model("llama")), V1: (V1, tiny_model("llama")), "main": (V2, newer)},
        "acme/private": {"main": (V2, newer)},
    }
    hub_server.actions["/move"] = lambda: hub_server.repositories["acme/tiny"].update(v1=(V2, newer))
    hub_server.private.add("acme/private")
    hub_server.gated.add("acme/gated")
    rows = [{"prompt": f"What is {n} and one?", "response": f"It is {n + 1}."} for n in range(8)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--data", "demos.jsonl", "train.max_steps=1", "data.eval_size=2", "train.use_cpu=true"]
    small += ["train.per_device_train_batch_size=1", "train.save_strategy=no", "train.eval_strategy=no"]

    def sft(model: str, output: str, *more: str) -> list[str]:
        return ["train", "--plugin", "sft", "--model", model, "--output", output, *small, *more]

    def sample(model: str, file: str, *more: str) -> list[str]:
        return ["sample", model, "demos.jsonl", "-o", file, "-k", "1", "--max-new-tokens", "4", *more]

    pinned = "model_kwargs.revision=v1"
    read_json = "import datasets; datasets.load_dataset('json', data_files='demos.jsonl', cache_dir='datasets')"
    no_token, offline = {"HF_TOKEN": ""}, {"HF_HUB_OFFLINE": "1"}
    commands: dict[str, tuple[dict[str, str], list[str]]] = {
        "private": (no_token, sft("acme/private", "out")),
        "bad token": ({"HF_TOKEN": "hf_bad"}, sft("acme/private", "out")),
        "token": ({"HF_TOKEN": TOKEN}, sample("acme/private", "private.jsonl")),
        "gated": (no_token, sft("acme/gated", "out")),
        "missing": ({}, ["chat", "acme/nowhere", "--prompt", "Hi"]),
        "no revision": ({}, sft("acme/tiny", "out", "model_kwargs.revision=v9")),
        "v1": ({}, sft("acme/tiny", "pinned", pinned)),
        "move": ({}, ["python", "import urllib.request as r, os; r.urlopen(os.environ['HF_ENDPOINT'] + '/move')"]),
        "sample": ({}, sample("pinned/sft", "run.jsonl")),
        "sample v1": ({}, sample("acme/tiny", "old.jsonl", f"model_kwargs.revision={V1}")),
        "sample main": ({}, sample("acme/tiny", "new.jsonl")),
        "compare": ({}, ["evaluate", "pinned/sft", "--data", "demos.jsonl", "--json"]),
        "other revision": ({}, ["check", "--plugin", "rm", "rm.policy=pinned/sft", "model_kwargs.revision=main"]),
        "read a file": ({}, ["python", read_json]),
        "offline": (offline, sample("pinned/sft", "offline.jsonl")),
        "offline by name": (offline, sample("acme/tiny", "offline-2.jsonl", f"model_kwargs.revision={V1}")),
        "not cached": (offline, sft("acme/elsewhere", "out")),
    }
    variables = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ALIGNKIT_DEBUG"))}
    driver = Path(__file__).with_name("commands_on_hub.py")
    done = subprocess.run(
        [sys.executable, "-P", str(driver)],
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**env, **variables, "no_proxy": "*", "ALIGNKIT_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    return Session(dict(zip(commands, printed["results"], strict=True)), printed["addresses"], folder)


def test_a_model_that_cannot_be_had_is_one_line_that_says_what_to_do(session: Session, hub_server: HubServer) -> None:
    where = f"is not on {hub_server.url}, or it is private. Check the name; if it is private, "
    assert f"acme/private {where}set the environment variable HF_TOKEN" in session.error("private")
    assert f"acme/private {where}use a token that has access" in session.error("bad token")
    assert f"acme/gated is gated. Accept its terms on {hub_server.url}/acme/gated, and set" in session.error("gated")
    assert f"acme/nowhere {where}" in session.error("missing")
    assert "acme/tiny has no revision 'v9'" in session.error("no revision")


def test_a_private_model_is_loaded_with_the_token_of_the_environment(session: Session) -> None:
    assert session.results["token"]["status"] == 0, session.results["token"]["err"]


def test_a_run_keeps_the_commit_that_it_was_trained_on(session: Session) -> None:
    """Also after the revision of its base has moved, and in plain PEFT."""
    assert session.results["v1"]["status"] == 0, session.results["v1"]["err"]
    record = session.record("pinned/sft")
    assert all(session.results[name]["status"] == 0 for name in ("sample v1", "sample main")), session.results
    adapter = json.loads((session.folder / "pinned/sft/adapter_config.json").read_text())

    assert record["base"]["located"] == "acme/tiny"
    assert (record["base"]["revision"], record["model"]["revision"]) == (V1, V1)
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("acme/tiny", V1)
    for name in ("sample", "compare", "offline"):
        assert session.results[name]["status"] == 0, session.results[name]["err"]
    assert (session.folder / "offline.jsonl").read_bytes() == (session.folder / "run.jsonl").read_bytes()


def test_the_revision_decides_which_weights_are_loaded(session: Session) -> None:
    old, new, offline = (
        json.loads((session.folder / f"{name}.jsonl").read_text().splitlines()[0])
        for name in ("old", "new", "offline-2")
    )
    assert old["responses"] == offline["responses"]
    assert old["sampled_from"]["weights"] != new["sampled_from"]["weights"]
    assert json.loads(session.results["compare"]["out"])["perplexity"][0]["run"] == "acme/tiny"


def test_a_child_cannot_start_from_another_revision(session: Session) -> None:
    error = session.error("other revision")
    assert "its base was loaded with model_kwargs.revision='v1', not 'main'" in error


def test_without_the_network_what_is_not_in_the_cache_is_one_line(session: Session) -> None:
    assert "acme/elsewhere is not in the cache, and the hub is offline" in session.error("not cached")


def test_nothing_is_sent_to_another_address_than_the_endpoint(session: Session, hub_server: HubServer) -> None:
    assert session.results["read a file"]["status"] == 0, session.results["read a file"]["err"]
    assert session.addresses == [hub_server.url.removeprefix("http://")]


def test_the_perplexity_of_the_base_is_that_of_plain_transformers(
    session: Session, tiny_model: Callable[..., Path]
) -> None:
    """`evaluate` compares with the base at the run's commit: the weights of v1, in fp32 or in bf16."""
    rows = json.loads(session.results["compare"]["out"])["perplexity"]
    base, run = rows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = session.record("pinned/sft")
    tokenizer = AutoTokenizer.from_pretrained(session.folder / "pinned/sft")
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=getattr(torch, record["dtype"]))
    total, tokens = 0.0, 0
    for line in (session.folder / "demos.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        end = next(i for i, token in enumerate(ids) if i >= len(prompt) and token in record["stop_ids"]) + 1
        with torch.no_grad():
            logps = model(torch.tensor([ids[:end]])).logits.float().log_softmax(-1)[0]
        total -= sum(float(logps[i - 1, ids[i]]) for i in range(len(prompt), end))
        tokens += end - len(prompt)

    assert base["nats_per_token"] == pytest.approx(total / tokens, rel=2e-2)
    assert base["tokens"] == run["tokens"] == tokens
