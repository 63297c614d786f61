"""The memory that PPO takes on one GPU: 1.5B, 3B and 8B models, full, LoRA and QLoRA. No weights are downloaded.

::

    python benchmarks/ppo_memory.py
    python benchmarks/ppo_memory.py --shapes 8B --tuners qlora --optimizer adamw_8bit

Computed (``memory_computed.py``): the real modules and adapters are built on tensors without data, and a sampling and a
training step run on them with every allocation counted. What cannot run this way is added by arithmetic: 4-bit weights,
optimizer states and the cache of sampling. CUDA's own memory (about half a GiB) and the waste of its allocator are not
included.

Measured, where there is a GPU (``memory_measured.py``): alignkit's own PPO run on random weights, by
``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from memory_computed import Parts, compute
from memory_measured import measure
from memory_shapes import SHAPES

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
    memory = torch.cuda.get_device_properties(0).total_memory // GIB if torch.cuda.is_available() else 24
    parser.add_argument(
        "--gpu-memory",
        type=int,
        default=memory,
        help="GiB; default: of this GPU, or 24. With more, more logits at a time",
    )
    parser.add_argument("--no-checkpointing", dest="gradient_checkpointing", action="store_false")
    parser.add_argument("--bf16-weights", action="store_true", help="full: tuner.dtype=bfloat16")
    options = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Parts)]
    print("GiB    tuner     " + "".join(f"{name:>10}" for name in [*names, "peak"]) + "   how")
    for shape in options.shapes:
        for tuner in options.tuners:
            parts = compute(shape, tuner, options)
            row = [*dataclasses.astuple(parts), parts.peak]
            print(f"{shape:<7}{tuner:<10}" + "".join(f"{n / GIB:>10.2f}" for n in row) + "   computed", flush=True)
            if torch.cuda.is_available():
                peak = measure(shape, tuner, options)
                print(f"{shape:<7}{tuner:<10}{'':>50}{peak / GIB:>10.2f}   measured", flush=True)


if __name__ == "__main__":
    main()
