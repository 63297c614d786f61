"""The command that starts a vLLM server from which the rollout engine ``vllm`` samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from alignkit import paths
from alignkit.errors import ConfigError
from alignkit.runs import base, lineage, manifest

ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
RANK = 16  # of the adapters of `lora` and `qlora`


def command(
    model: str, rank: int | None, host: str, port: int, options: Sequence[str] = (), program: str = "vllm"
) -> list[str]:
    """The command for the base model of a run, or for a base model, with room for two adapters of this rank.

    Two are loaded while one replaces the other. Without ``rank`` it is that of the run's adapter, or 16.

    Raises:
        ConfigError: there is no such run or model, it has no policy, or vLLM has no such rank.
    """
    folder = paths.expand(model)
    record: dict[str, Any] = {}
    if manifest.is_run(folder):
        record = lineage.named("serve-rollouts", model, "policy").manifest or {}
        located = base.of_run(record, folder, lambda line: None)
        revision = (record.get("base") or {}).get("revision")
    else:
        base.check(model)
        located, revision = base.locate(model, lambda line: None), None
    if rank is None and record.get("weights") == "adapter":
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("r")
    rank = rank or RANK
    if rank > RANKS[-1]:
        raise ConfigError(f"serve-rollouts: vLLM supports adapters up to rank {RANKS[-1]}, not {rank}")
    words = [program, "serve", located, *(["--revision", revision] if revision else [])]
    words += ["--host", host, "--port", str(port), "--enable-lora", "--max-loras", "2"]
    words += ["--max-lora-rank", str(next(larger for larger in RANKS if larger >= rank))]
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if record.get("dtype"):
        words += ["--dtype", record["dtype"]]
    return [*words, *options]
