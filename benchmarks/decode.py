"""Tokens per second of the rollout engines, in turns in one process, on the same policy and prompts.

::

    python benchmarks/decode.py
    taskset -c 0 python benchmarks/decode.py --clock cpu --runs 5

The policy has LoRA adapters on all linear layers, as is PPO's default. All answers have the same length (``even``),
or each ends with its first sentence (``ragged``). Ratios are those of neighboring runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers

from alignkit import Sampling, bundled
from alignkit.data import load_tokenizer, prompt_ids
from alignkit.models import run_device, run_dtype
from alignkit.registry import Registry
from alignkit.runs import locate_model

GRAPHS = "decode graphs"  # the engine `decode` with rollout.cuda_graphs=true
MERGED = "decode merged"  # the engine `decode` with rollout.merge_lora=true


def main() -> None:
    options = arguments()
    policy, tokenizer, prompts = prepare(options)
    sentence_ends = [token for token in range(len(tokenizer)) if set(".!?\n") & set(tokenizer.decode([token]))]
    lengths: dict[str, tuple[int, ...]] = {"even": (), "ragged": tuple(sentence_ends)}
    print(f"{'answers':8} {'engine':13} {'tokens':>7} {'tokens/s':>9}  ratio to {options.engines[0]}: median (range)")
    for name, stop_ids in lengths.items():
        sampling = Sampling(options.new_tokens, temperature=1.0, stop_ids=stop_ids, samples=options.samples)
        engines = {engine: build(engine, tokenizer, sampling) for engine in options.engines}
        speeds: dict[str, list[float]] = {engine: [] for engine in engines}
        sampled = dict.fromkeys(engines, 0)
        for run, engine in itertools.product(range(options.runs + 1), engines):
            tokens, seconds = measure(engines[engine], policy, prompts, options.clock, seed=run)
            if run:  # the first one warms up, and checks that the engine fits the model
                speeds[engine].append(tokens / seconds)
                sampled[engine] += tokens
        for engine, measured in speeds.items():
            ratios = [a / b for a, b in zip(measured, speeds[options.engines[0]], strict=True)]
            print(
                f"{name:8} {engine:13} {sampled[engine] // options.runs:7} {statistics.median(measured):9.0f}  "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def prepare(options: argparse.Namespace) -> tuple[Any, Any, list[list[int]]]:
    """The policy in the dtype that alignkit chooses for this device, its tokenizer, and prompts as token ids."""
    located = locate_model(options.model, print)
    model = transformers.AutoModelForCausalLM.from_pretrained(located, dtype=run_dtype({}))
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = peft.get_peft_model(model, config).eval().to(run_device({}))
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # a trained adapter is not 0
            parameter.data.normal_(std=1e-3)
    tokenizer = load_tokenizer(located, None)
    rows = [json.loads(line) for line in bundled.data("bundled:prompts").read_text(encoding="utf-8").splitlines()]
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]
    return policy, tokenizer, prompts[: options.rows // options.samples]


def build(engine: str, tokenizer: Any, sampling: Sampling) -> Callable[..., list[list[int]]]:
    rollout = Registry().get("rollout", engine.partition(" ")[0])
    surroundings = SimpleNamespace(say=print, device=run_device({}), config=SimpleNamespace(train={}))
    run = {"run": surroundings} if rollout.name == "decode" else {}
    of_decode = {"cuda_graphs": engine == GRAPHS, "merge_lora": engine == MERGED}
    config = rollout.config(**(of_decode if rollout.name == "decode" else {}))
    built: Callable[..., list[list[int]]] = rollout.build(config, tokenizer, sampling, **run)
    return built


def measure(
    engine: Callable[..., list[list[int]]], policy: Any, prompts: list[list[int]], clock: str, seed: int
) -> tuple[int, float]:
    """Tokens of all answers, and seconds."""
    now = time.process_time if clock == "cpu" else time.monotonic
    dtype = run_dtype({})
    transformers.set_seed(seed)
    start = now()
    with torch.no_grad(), torch.autocast(policy.device.type, dtype, enabled=dtype is not torch.float32):
        answers = engine(policy, prompts)
    return sum(map(len, answers)), now() - start


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m")
    graphs = [GRAPHS] if torch.cuda.is_available() else []
    parser.add_argument("--engines", nargs="+", default=["generate", "decode", MERGED, *graphs, "continuous"])
    parser.add_argument("--rows", type=int, default=32, help="answers in a batch")
    parser.add_argument("--samples", type=int, default=1, help="answers per prompt")
    parser.add_argument("--new-tokens", type=int, default=48, help="maximum tokens of an answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds, for a shared machine"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
