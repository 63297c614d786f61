"""Seconds and memory of ``alignkit export``, and how its results differ from the run, for each tuner and number format.

::

    python benchmarks/export.py
    python benchmarks/export.py --model Qwen/Qwen2.5-0.5B-Instruct --tuners qlora --dtypes bfloat16

Each export is a process of its own. Memory is the peak of its private memory, less that of a process that only imports
the same libraries, as a multiple of the weights that were written. ``resident`` also counts the files of weights that
are mapped into memory: the system takes these pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

IMPORTS = (
    "import bitsandbytes, datasets, peft, torch, transformers, alignkit.generation.sampling, alignkit.models.plain"
)
ALIGNKIT = ["-m", "alignkit"]


class Process(NamedTuple):
    """What a finished process took."""

    seconds: float
    private: int  # bytes, the peak of its private memory
    resident: int  # bytes, the peak of its resident set


def run(arguments: list[str]) -> Process:
    """Run Python with these arguments."""
    start, private = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if found := re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            private = max(private, int(found[1]) * 1024)
        time.sleep(0.02)
    process.returncode = status
    if status:
        sys.exit(f"failed: python {' '.join(arguments)}")
    return Process(time.perf_counter() - start, private, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--tuners", nargs="+", default=["qlora", "lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=4, help="of training, so that there is something to merge")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        imports = run(["-c", IMPORTS])
        for tuner in options.tuners:
            sft = Path(name, tuner, "sft")
            given = ["--model", options.model, "--output", str(sft.parent), f"train.max_steps={options.steps}"]
            train = [*ALIGNKIT, "train", "--plugin", "sft", "--plugin", tuner, *given, "data.eval_size=8"]
            subprocess.run([sys.executable, *train], check=True, capture_output=True)
            for dtype in options.dtypes:
                to = Path(name, f"{tuner}-{dtype}")
                took = run([*ALIGNKIT, "export", str(sft), "--to", str(to), "--dtype", dtype])
                written = sum(file.stat().st_size for file in to.glob("*.safetensors"))
                export = json.loads((to / "export.json").read_text())["export"]
                memory, resident = took.private - imports.private, took.resident - imports.resident
                print(
                    f"{tuner:<6} {dtype:<9} {took.seconds:5.1f} s   memory {memory / written:.2f}, resident "
                    f"{resident / written:.2f} of {written / 1e6:,.1f} MB   KL {export['kl']:.1e}   largest difference "
                    f"{export['largest']:.1e}   agreement {export['greedy_agreement']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
