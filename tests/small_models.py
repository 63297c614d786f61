"""A small stand-in for the bundled model; ``conftest.py`` registers it for all tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignkit import bundled


@pytest.fixture(scope="session")
def small_bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``ALIGNKIT_CACHE`` where the bundled model is small and random, with its own tokenizer and template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    real = bundled.convert(bundled.MODELS[0], print)
    cache = tmp_path_factory.mktemp("cache")
    small = cache / real.name
    shutil.copytree(real, small, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(real, **sizes, **heads)
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(small)
    return cache
