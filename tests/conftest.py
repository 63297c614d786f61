"""Tiny models of real architectures with a real tokenizer, and plugins installed for real."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 tokens, trained on the bundled demonstrations; pad is not set, eos is <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from alignkit import bundled

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = [json.loads(line) for line in bundled.DATA["bundled:demonstrations"].read_text().splitlines()]
    tokenizer.train_from_iterator(
        (text for row in rows for text in row.values()),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model("llama")``: a folder with a two-layer random model of that architecture and the tokenizer."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama") -> Path:
        if architecture not in made:
            import torch
            from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

            sizes = {
                "vocab_size": 576,  # some tokenizer classes add tokens of their own
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 512,
                "bos_token_id": None,
                "eos_token_id": 0,
                "pad_token_id": None,
            }
            if architecture == "gpt2":
                sizes = {"vocab_size": 576, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
                sizes |= {"bos_token_id": 0, "eos_token_id": 0}
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**sizes))
            made[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(made[architecture])
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(made[architecture])
        return made[architecture]

    return make


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``install("simpo", code)``: a plugin with the metadata of a real distribution, on ``sys.path`` for this test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def put(name: str, code: str, distribution: str = "", version: str = "0.1") -> None:
        distribution = distribution or f"alignkit-{name}"
        module = distribution.replace("-", "_") + "_plugin"
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[alignkit]\n{name} = {module}\n")

    return put


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``train("--plugin", "lora", "train.max_steps=2")``: an SFT run of a tiny model in this process -> its folder."""
    from alignkit.cli import main

    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")  # no quiet(): its settings are for a whole process

    def run(*arguments: str, model: str = "llama", output: str = "out") -> Path:
        data = tmp_path / "demos.jsonl"
        if not data.exists():
            data.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
        given = ["--model", str(tiny_model(model)), "--output", str(tmp_path / output), *arguments]
        if "--data" not in arguments:
            given += ["--data", str(data)]
        small = ["train.per_device_train_batch_size=2", "data.eval_size=4", "train.use_cpu=true"]
        assert main(["--debug", "train", "--plugin", "sft", *given, *small]) == 0
        return tmp_path / output / "sft"

    return run


DEMONSTRATIONS = [
    {"prompt": f"What is {n} and one?", "response": f"It is {n + 1}. " + "Count on! " * (n % 3 + 1)} for n in range(16)
]
