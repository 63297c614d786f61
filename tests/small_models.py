"""A small stand-in for the bundled model; ``conftest.py`` registers it for all tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from alignkit import bundled

TOKENS = 8192  # of the bundled model's 49,152


@pytest.fixture(scope="session")
def small_bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``ALIGNKIT_CACHE`` where the bundled model is small and random, with its own template and its first tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    real = bundled.convert(bundled.MODELS[0], print)
    cache = tmp_path_factory.mktemp("cache")
    small = cache / real.name
    shutil.copytree(real, small, ignore=shutil.ignore_patterns("*.safetensors"))
    shorten(small / "tokenizer.json")
    sizes = {"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(real, **sizes, **heads)
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(small)
    return cache


def shorten(file: Path) -> None:
    """Leave out all but the first tokens; texts are split into more of them."""
    content = json.loads(file.read_text())
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(content))
