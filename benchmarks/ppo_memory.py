"""The memory that PPO takes on one GPU: 1.5B, 3B and 8B models, full, LoRA and QLoRA. No weights are downloaded.

::

    python benchmarks/ppo_memory.py
    python benchmarks/ppo_memory.py --shapes 8B --tuners qlora --optimizer adamw_8bit

Computed as ``alignkit plan`` does, without what CUDA and its allocator take. Where there is a GPU, also measured:
alignkit's PPO runs on random weights, see ``memory_measured.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory_measured import measure, planned
from memory_shapes import SHAPES, write_model

from alignkit import planning

TUNERS = ("full", "lora", "qlora")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5B", "3B", "8B"])
    parser.add_argument("--tuners", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--optimizer", default="adamw_8bit", choices=("adamw", "adamw_8bit"))
    parser.add_argument("--microbatch", type=int, default=4, help="answers in a forward with gradients")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt with its answer")
    parser.add_argument("--response", type=int, default=256, help="tokens of the answer among them")
    parser.add_argument("--sampled", type=int, default=16, help="answers that are sampled at a time")
    parser.add_argument("--value", choices=("adapter", "head"), default="adapter", help="ppo.value")
    parser.add_argument("--gpu-memory", type=int, help="GiB; default: of this GPU, or 24. With more, more logits")
    parser.add_argument("--no-checkpointing", dest="gradient_checkpointing", action="store_false")
    parser.add_argument("--bf16-weights", action="store_true", help="full: tuner.dtype=bfloat16")
    options = parser.parse_args()
    print("GiB    tuner     " + "".join(f"{phase:>16}" for phase in ("sampling", "scoring", "training")) + "   how")
    for shape in options.shapes:
        for tuner in options.tuners:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                write_model(shape, "base")
                settings = settings_of(tuner, options)
                memory = options.gpu_memory and options.gpu_memory * GIB
                phases = planning.memory(planned(settings), "cuda", memory).phases
                name = f"{shape:<7}{tuner:<10}"
                sizes = (sum(phases[phase].values()) / GIB for phase in ("sampling", "scoring", "training"))
                print(name + "".join(f"{size:>16.2f}" for size in sizes) + "   computed", flush=True)
                if torch.cuda.is_available():
                    peak = measure(settings, "random_weights")
                    print(f"{name}{'peak':>32}{peak / GIB:>16.2f}   measured", flush=True)


def settings_of(tuner: str, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of PPO on the model in the folder ``base``. A reward model would be another adapter."""
    words = options.length - options.response - 20  # the chat template adds tokens
    rows = [{"prompt": "a " * words + str(n)} for n in range(options.sampled)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("reward.py").write_text("def score(prompts, answers):\n    return [len(a) / 100 for a in answers]\n")
    table = {
        **{"policy": "base", "iterations": 2, "batch_size": options.sampled, "minibatches": 1, "value": options.value},
        **{"response_length": options.response, "max_prompt_length": 2 * options.length},
        **{"data": {"path": "prompts.jsonl", "eval_size": 0}, "reward": {"name": "function", "call": "reward:score"}},
    }
    train = {
        **{"per_device_train_batch_size": options.microbatch, "save_strategy": "no"},
        **{"gradient_checkpointing": options.gradient_checkpointing, "use_cpu": not torch.cuda.is_available()},
    }
    return {
        **{"plugins": ["ppo", tuner], "model": "base", "output": "runs", "optimizer": {"name": options.optimizer}},
        **({"tuner": {"dtype": "bfloat16"}} if options.bf16_weights and tuner == "full" else {}),
        **{"train": train, "stages": {"ppo": table}},
    }


if __name__ == "__main__":
    main()
