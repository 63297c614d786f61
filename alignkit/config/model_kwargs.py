"""The ``model_kwargs`` table: arguments of ``from_pretrained`` for the base model.

A key that is not an argument overrides an attribute of the model's config, as in ``from_pretrained``. Imports no torch.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

from alignkit.errors import ConfigError

ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# packages of which one must be installed; `kernels` downloads the kernel
FLASH = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
    "flash_attention_4": ("flash_attn", "kernels"),
}

OPTIONS: dict[str, Any] = {  # the arguments that users may set, with their types
    "revision": str,
    "code_revision": str,
    "trust_remote_code": bool,
    "attn_implementation": str,
    "experts_implementation": str,
    "device_map": str | int | dict[str, str | int],
    "variant": str,
    "use_safetensors": bool,
    "key_mapping": dict[str, str],
    "disable_mmap": bool,
}
PLACEMENT = ("device_map", "disable_mmap")  # how weights get into memory: they change no result
COMPUTE = ("attn_implementation", "experts_implementation")  # equal up to rounding
FILES = ("revision", "code_revision", "variant", "use_safetensors", "key_mapping")  # of the base; not those of a run

_ONE_DEVICE = "each model is on one device as a whole. If it does not fit, use --plugin qlora"
_NOT_SHARDED = "models are not sharded; to train on N GPUs, use torchrun --nproc_per_node=N"
_OF_FILES = "it is read from the model's files"
_BY_ALIGNKIT = "alignkit sets it"
REFUSED = {  # -> the reason, or what to do instead
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        "set train.bf16 or train.fp16, and tuner.dtype for the weights",
    ),
    **dict.fromkeys(
        ("quantization_config", "load_in_4bit", "load_in_8bit"),
        "use --plugin qlora",
    ),
    **dict.fromkeys(
        ("token", "use_auth_token"),
        "run folders would contain it. Set the environment variable HF_TOKEN, or run hf auth login",
    ),
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "force_download": "delete the model from the cache with hf cache rm",
    "proxies": "set the environment variable HTTPS_PROXY",
    "subfolder": "download the model, and set model to the folder",
    "gguf_file": "convert the model with save_pretrained, and set model to that folder",
    **dict.fromkeys(("max_memory", "offload_folder", "offload_buffers", "offload_state_dict"), _ONE_DEVICE),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _NOT_SHARDED),
    **dict.fromkeys(("config", "state_dict", "generation_config", "tie_word_embeddings", "architectures"), _OF_FILES),
    **dict.fromkeys(("model_type", "auto_map", "is_encoder_decoder", "name_or_path"), _OF_FILES),
    **dict.fromkeys(("adapter_kwargs", "adapter_name"), "to start from an adapter, name its run: ppo.policy=RUN"),
    "ignore_mismatched_sizes": "weights that do not fit would be random",
    "weights_only": "weight files could run code",
    **dict.fromkeys(("output_loading_info", "return_dict", "output_hidden_states", "output_attentions"), _BY_ALIGNKIT),
    **dict.fromkeys(("num_labels", "id2label", "label2id", "problem_type"), "reward models have one score head"),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), "it is read from the tokenizer"),
    "use_cache": "sampling uses a cache, and training uses none",
    **dict.fromkeys(
        ("use_kernels", "kernel_config", "allow_all_kernels", "fusion_config"),
        "it would replace layers that adapters and losses use",
    ),
}


def check(table: Mapping[str, Any], use_cpu: bool = False) -> dict[str, Any]:
    """Check a ``model_kwargs`` table, and leave out the keys that are null. ``use_cpu`` is ``train.use_cpu``.

    Raises:
        ConfigError: a key that alignkit decides, a misspelled argument, or a value of the wrong type.
    """
    table = {name: value for name, value in table.items() if value is not None}
    for name, value in table.items():
        if name in REFUSED:
            raise ConfigError(f"model_kwargs.{name} is not supported: {REFUSED[name]}")
        if name in OPTIONS:
            _check_type(name, value)
        elif close := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8):
            raise ConfigError(f"unknown key model_kwargs.{name}. Did you mean '{close[0]}'?")
    if "attn_implementation" in table:
        _check_attention(table["attn_implementation"], use_cpu)
    if "device_map" in table:
        _check_device_map(table["device_map"])
    return table


def _check_type(name: str, value: Any) -> None:
    from pydantic import TypeAdapter, ValidationError  # slow to import

    try:
        TypeAdapter(OPTIONS[name]).validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        quotes = f". Write it in quotes: model_kwargs.{name}='\"{value}\"'" if OPTIONS[name] is str else ""
        raise ConfigError(f"model_kwargs.{name}: {message} (got {value!r}){quotes}") from None


def _check_attention(name: str, use_cpu: bool) -> None:
    if name not in ATTENTION:
        hint = "" if "/" not in name else ": kernels of the hub are code"
        raise ConfigError(
            f"model_kwargs.attn_implementation: '{name}' is not supported{hint}. Choose one of {', '.join(ATTENTION)}"
        )
    packages = FLASH.get(name)
    if packages and use_cpu:
        raise ConfigError(f"model_kwargs.attn_implementation: {name} does not work on a CPU. Remove it, or choose sdpa")
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise ConfigError(
            f"model_kwargs.attn_implementation: {name} needs a package that is not installed: pip install kernels"
        )


def _check_device_map(value: Any) -> None:
    """One device for the whole model: its name or number, ``{"": device}``, or ``"auto"`` if the model fits on it."""
    names = "a device such as cuda, or auto"
    if isinstance(value, dict) and list(value) != [""]:
        raise ConfigError(f"model_kwargs.device_map: {_ONE_DEVICE}. Set it to {names}")
    device = value[""] if isinstance(value, dict) else value
    if isinstance(device, str) and (device in ("balanced", "balanced_low_0", "sequential", "disk", "meta")):
        raise ConfigError(f"model_kwargs.device_map: {device} is not supported: {_ONE_DEVICE}. Set it to {names}")


def inherited(table: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a run inherits from its parent: everything but :data:`PLACEMENT` and ``trust_remote_code``.

    Only the user can allow the code of a model repository, and not a run folder, which may be a stranger's.
    """
    return {name: value for name, value in table.items() if name not in (*PLACEMENT, "trust_remote_code")}


def describe(table: Mapping[str, Any]) -> str:
    """The table as text for the plan."""
    text = ", ".join(f"{name}={value}" for name, value in table.items())
    return f"{text} (runs code of the model's repository)" if table.get("trust_remote_code") else text


def same_base(table: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that two runs on one base must have in common: the files, and attributes of the config."""
    free = (*PLACEMENT, *COMPUTE, "trust_remote_code", "code_revision", "use_safetensors")
    return {name: value for name, value in {"revision": "main", **table}.items() if name not in free}
