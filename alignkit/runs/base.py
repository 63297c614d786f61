"""The base model of a run: a hub id, a folder, or a bundled model. Functions that need torch import it themselves."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import bundled, paths
from alignkit.data import hub
from alignkit.errors import ConfigError, DataError, suggestion
from alignkit.protocols import Limits
from alignkit.runs import manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignkit.components import Tuner


def check(name: str) -> None:
    """Check that ``name`` can be a base model, without the network and without loading it.

    Raises:
        ConfigError: no such folder or bundled model, a folder without a decoder-only model, or an adapter.
    """
    if name.startswith(bundled.PREFIX):
        bundled.model(name)
        return
    folder = paths.expand(name) if name.startswith(("~/", "~\\")) else Path(name)
    if folder.is_file():
        raise ConfigError(f"{name} is a file. A model is a folder with a config.json, or a hub id")
    if not folder.exists():
        if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise ConfigError(suggestion(f"no model folder {name}", folder.name, beside))
        return  # a hub id
    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"{name} is an adapter, not a full model. Use its base with --model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{name} is not a model: it has no config.json{_run_inside(folder)}") from None
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    architectures = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(a.endswith(("CausalLM", "LMHeadModel")) for a in architectures):
        raise ConfigError(
            f"{name} is a {' '.join(architectures) or 'model without an architecture'}, not a decoder-only model"
        )


def check_head(name: str) -> None:
    """Check that Transformers supports this base with a scalar head, as reward models need. Imports torch.

    Raises:
        ConfigError: it does not.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(locate(name, lambda line: None), trust_remote_code=False)
    except (OSError, ValueError):  # loading the model will report the error
        return
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = config.model_type
        raise ConfigError(f"{name} cannot be a reward model: Transformers has no {kind} for sequence classification")


def check_trainable(name: str, tuner: Tuner) -> None:
    """Check that a tuner can train this base, without the network and without loading it.

    Raises:
        ConfigError: the base is quantized, and the tuner trains its weights.
    """
    folder = folder_of(locate(name, lambda line: None)) if not name.startswith(bundled.PREFIX) else None
    config = folder / "config.json" if folder else None
    if tuner.adapters or config is None or not config.is_file():
        return
    if quantization := json.loads(config.read_text(encoding="utf-8")).get("quantization_config"):
        raise quantized_error(name, quantization.get("quant_method", "bitsandbytes"), tuner)


def quantized_error(name: str, method: str, tuner: Tuner) -> ConfigError:
    """The error for a quantized base whose weights a tuner would train."""
    return ConfigError(
        f"{name} is quantized ({method}), and tuner '{tuner.name}' would train its weights. Use --plugin lora, or the "
        "model that it was quantized from"
    )


def _run_inside(folder: Path) -> str:
    runs = [str(inside) for inside in sorted(folder.iterdir()) if inside.is_dir() and manifest.is_run(inside)]
    return f". Runs in it: {', '.join(runs)}" if runs else ""


def locate(name: str, say: Callable[[str], None]) -> str:
    """The argument for ``from_pretrained``: a hub id or an absolute path. A bundled model is converted on first use."""
    if name.startswith(bundled.PREFIX):
        return str(bundled.convert(name, say))
    folder = paths.expand(name)
    if folder.exists():
        return os.path.abspath(folder)
    hub.offline_if_unreachable()
    return name


def folder_of(located: str) -> Path | None:
    """The folder with the files of a located base: the folder itself, or the snapshot in the hub's cache.

    Raises:
        ConfigError: the path does not exist.
    """
    if Path(located).is_dir():
        return Path(located)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(located, "config.json")
    except HFValidationError:  # a path that was removed after the run was planned
        raise ConfigError(f"no model folder {located}") from None
    return Path(cached).parent if isinstance(cached, str) else None


def folder_on_disk(name: str) -> Path | None:
    """The folder of a base model; None if it is not on this disk, such as a bundled model before its first use."""
    if not name.startswith(bundled.PREFIX):
        return folder_of(locate(name, print))
    folder = bundled.model(name)
    return folder if folder.is_dir() else None


def stop_ids(located: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which generation stops.

    They are the tokenizer's EOS token, those of the generation config, and the token with which the chat template
    ends a turn.
    """
    from transformers import GenerationConfig

    from alignkit.data.chat_template import turn_end

    try:
        eos = GenerationConfig.from_pretrained(located).eos_token_id
    except OSError:  # a model without a generation config
        eos = None
    more = eos if isinstance(eos, list) else [eos]
    known = [stop for stop in [tokenizer.eos_token_id, *more] if stop is not None]
    end = turn_end(tokenizer, known)
    return list(dict.fromkeys([*known, *([] if end is None else [end])]))


def check_length(model: Any, tokens: int, what: str, instead: str) -> None:
    """Check that a loaded model can read sequences of this many tokens.

    Raises:
        DataError: its position embeddings are fewer. ``what`` names the sequence, ``instead`` the remedy.
    """
    known = limits_of(model.config.to_dict())
    if known.learnt and known.positions is not None and tokens > known.positions:
        raise DataError(
            f"{what}: {tokens} tokens are more than the {known.positions} positions of the model. {instead}"
        )


LEARNT_POSITIONS = ("gpt2", "openai-gpt", "gpt_bigcode", "gpt_neo", "opt", "biogpt")  # model types
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # keys of a config


def limits(located: str) -> Limits:
    """The limits of a located base. Unknown if its config is not on this disk."""
    folder = folder_of(located)
    if folder is None or not (folder / "config.json").exists():
        return Limits(None, None, False)
    return limits_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def limits_of(config: dict[str, Any]) -> Limits:
    """The limits according to the content of a ``config.json``."""
    text = {**config, **(config.get("text_config") or {})}
    positions = text.get("n_positions", text.get("max_position_embeddings"))
    layers = next((text[name] for name in LAYERS if name in text), None)
    return Limits(text.get("vocab_size"), positions, text.get("model_type") in LEARNT_POSITIONS, layers)


def of_run(record: dict[str, Any], folder: Path, say: Callable[[str], None]) -> str:
    """The base model of a finished run: that of its adapter, or the run folder itself if it holds a full model."""
    if record["weights"] == "model":
        return os.path.abspath(folder)
    name: str = record["base"]["name"]
    return locate(name, say) if name.startswith(bundled.PREFIX) else str(record["base"]["located"])
