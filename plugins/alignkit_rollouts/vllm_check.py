"""Checks for what ``rollout.name=vllm`` cannot serve: in the settings before a run, and again in the adapter itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from alignkit import ConfigError, Plan

if TYPE_CHECKING:
    from alignkit_rollouts.config import VllmConfig

LARGEST_RANK = 512  # of vLLM's --max-lora-rank
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out")
ELSE = "Use another rollout engine, such as rollout.name=decode"


def check(config: VllmConfig, plan: Plan | None) -> None:
    """Check the addresses, and the tuner if there is a plan. No request is sent.

    Raises:
        ConfigError: an address is not one, or the tuner trains what vLLM cannot load.
    """
    if not config.urls:
        raise ConfigError("rollout.urls is empty: name at least one vLLM server, such as http://127.0.0.1:8000")
    for url in config.urls:
        if not _is_address(url):
            raise ConfigError(f"rollout.urls: {url!r} is not the address of a server, such as http://127.0.0.1:8000")
    if plan is None:
        return
    tuner = plan.config.tuner
    if not tuner.component.adapters:
        raise ConfigError(
            f"rollout 'vllm' sends an adapter to the server in each iteration, and tuner '{tuner.component.name}' has "
            f"none. Use --plugin lora or qlora, or another rollout engine"
        )
    check_lora(tuner.config)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in url
    except ValueError:  # from the port or the host
        return False


def check_lora(settings: Any) -> None:
    """Check the settings of an adapter, by PEFT's names: those of a tuner, or a ``peft.LoraConfig``.

    Raises:
        ConfigError: vLLM cannot load such an adapter.
    """
    if getattr(settings, "use_dora", False):
        raise ConfigError(f"vLLM does not support DoRA (tuner.use_dora=true). {ELSE}")
    if saved := getattr(settings, "modules_to_save", None):
        raise ConfigError(f"vLLM cannot load modules that are trained whole ({', '.join(saved)}). {ELSE}")
    if getattr(settings, "bias", "none") != "none" or getattr(settings, "lora_bias", False):
        raise ConfigError(f"vLLM cannot load trained biases. {ELSE}")
    rank = max([getattr(settings, "r", 0), *(getattr(settings, "rank_pattern", None) or {}).values()])
    if rank > LARGEST_RANK:
        raise ConfigError(f"vLLM supports LoRA up to rank {LARGEST_RANK}, and tuner.r is {rank}. {ELSE}")
    targets = getattr(settings, "target_modules", None) or []
    if not isinstance(targets, str):
        for target in targets:
            if target.rpartition(".")[2] in EMBEDDINGS:
                raise ConfigError(f"rollout 'vllm' supports no adapters on embeddings or the head ({target}). {ELSE}")


def check_policy(policy: Any) -> None:
    """Check the adapter of a policy, whatever tuner made it.

    Raises:
        ConfigError: vLLM cannot load it.
    """
    configs = getattr(policy, "peft_config", None) or {}
    if not configs:
        raise ConfigError(f"rollout 'vllm' needs a policy with a LoRA adapter. {ELSE}")
    settings = configs[policy.active_adapters[0] if hasattr(policy, "active_adapters") else "default"]
    kind = getattr(settings.peft_type, "value", settings.peft_type)
    if kind != "LORA":
        raise ConfigError(f"vLLM cannot load adapters of type {kind}, only LoRA. {ELSE}")
    check_lora(settings)
    inner = policy.get_base_model()
    for module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
        if hasattr(module, "lora_A"):
            raise ConfigError(f"rollout 'vllm' supports no adapters on embeddings or the head. {ELSE}")
