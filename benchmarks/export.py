"""Seconds and memory of ``alignkit export``, and how its results differ from the run, for each tuner and dtype.

::

    python benchmarks/export.py
    python benchmarks/export.py --model Qwen/Qwen2.5-0.5B-Instruct --tuners qlora --dtypes bfloat16

Each export is a process of its own. Memory is the peak of its private memory, less that of the same command for a model
of one small layer, as a multiple of the weights that were written. ``resident`` also counts the files of weights that
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

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alignkit.runs import locate_model

SMALL = {
    **{"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
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


def write_small(model: str, folder: Path) -> None:
    """A model with one small layer, and the config and tokenizer of ``model``."""
    located = locate_model(model, print)
    config = AutoConfig.from_pretrained(located, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(located).save_pretrained(folder)


def train(model: str, tuner: str, steps: int, folder: Path) -> Path:
    """Train with SFT, and return the run folder."""
    given = ["--model", model, "--output", str(folder), f"train.max_steps={steps}", "data.eval_size=8"]
    command = [sys.executable, *ALIGNKIT, "train", "--plugin", "sft", "--plugin", tuner, *given]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "sft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--tuners", nargs="+", default=["qlora", "lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=4, help="of training, so that there is something to merge")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_small(options.model, Path(name, "small"))
        for tuner in options.tuners:
            sft = train(options.model, tuner, options.steps, Path(name, tuner))
            small = train(str(Path(name, "small")), tuner, options.steps, Path(name, f"{tuner}-small"))
            for dtype in options.dtypes:
                to = Path(name, f"{tuner}-{dtype}")
                export = [*ALIGNKIT, "export", "--dtype", dtype, "--to"]
                took, others = run([*export, str(to), str(sft)]), run([*export, f"{to}-small", str(small)])
                written = sum(file.stat().st_size for file in to.glob("*.safetensors"))
                compared = json.loads((to / "export.json").read_text())["export"]
                memory, resident = took.private - others.private, took.resident - others.resident
                print(
                    f"{tuner:<6} {dtype:<9} {took.seconds:5.1f} s   memory {memory / written:.2f}, resident "
                    f"{resident / written:.2f} of {written / 1e6:,.1f} MB   KL {compared['kl']:.1e}   largest "
                    f"difference {compared['largest']:.1e}   agreement {compared['greedy_agreement']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
