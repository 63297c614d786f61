"""The benchmarks on the GPU of this machine, with small settings and one table: under 8 minutes.

::

    python benchmarks/gpu.py
    python benchmarks/gpu.py --trl trl-1.12 --only ppo

Each benchmark is its own script in a process of its own, one after the other. The most important ones run first; those
that time does not allow are named in the table. For figures with a spread, run the scripts with more ``--runs``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

BENCHMARKS = {  # name: script and arguments
    "decode": "decode.py --runs 2 --new-tokens 128",
    "ppo": "ppo_vs_trl.py --runs 1 --iterations 3",
    "ppo, value head": "ppo_vs_trl.py --runs 1 --iterations 3 --value head",
    "grpo": "grpo_vs_trl.py --runs 1 --iterations 3 --even",
    "memory": "ppo_memory.py --shapes 1.5B 8B --tuners lora qlora",
    "sft": "sft_vs_trl.py --runs 1 --steps 10",
    "rm": "rm_vs_trl.py --runs 1 --k 4 --strict --groups 16",
    "dpo": "dpo_vs_trl.py --runs 1 --steps 8",
    "kto": "kto_vs_trl.py --runs 1 --steps 8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--minutes", type=float, default=8, help="of all benchmarks together")
    parser.add_argument("--trl", type=Path, help="a folder with TRL 1.12, for PPO: see ppo_vs_trl.py")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py needs a CUDA GPU, and PyTorch finds none here", file=sys.stderr)
        sys.exit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print(row("benchmark", "seconds", "result"), flush=True)
    end = time.monotonic() + 60 * options.minutes
    for name in options.only:
        arguments = BENCHMARKS[name].split()
        if options.trl and arguments[0] == "ppo_vs_trl.py":
            arguments += ["--trl", str(options.trl)]
        start = time.monotonic()
        results = measure(arguments, end - start)
        taken = f"{time.monotonic() - start:.0f}"
        for line, first in zip(results, [True] + [False] * len(results), strict=False):
            print(row(name if first else "", taken if first else "", line), flush=True)


def row(name: str, seconds: str, result: str) -> str:
    return f"{name:<16} {seconds:>7}  {result}".rstrip()


def measure(arguments: list[str], seconds: float) -> list[str]:
    """The results that a benchmark prints, or one line that says why there are none."""
    script, *options = arguments
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            return ["no time left: choose it with --only, or set --minutes"]
    if process.returncode:
        return [f"failed: {(errors.strip() or output.strip() or str(process.returncode)).splitlines()[-1]}"]
    return results_of(output)


def results_of(output: str) -> list[str]:
    """The lines after the first blank line, which come after those of single runs; all lines if there is none."""
    runs, blank, summary = output.strip().partition("\n\n")
    return [line for line in (summary if blank else runs).splitlines() if line.strip()]


if __name__ == "__main__":
    main()
