"""Times of the quick commands, beside ``import torch``; in turns, whole processes.

::

    python benchmarks/start_up.py --runs 5
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "alignkit --help": ["-m", "alignkit", "--help"],
    "alignkit plugins": ["-m", "alignkit", "plugins"],
    "alignkit config": ["-m", "alignkit", "config", "--plugin", "sft"],
    "alignkit check": ["-m", "alignkit", "check", "--plugin", "sft"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    took: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, arguments in COMMANDS.items():
            lasted = seconds(arguments)
            if turn:  # the first fills the caches
                took[name].append(lasted)
    torch = statistics.median(took["import torch"])
    for name, lasted in took.items():
        median = statistics.median(lasted)
        print(f"{name:<18} {median:6.3f} s   {median / torch:5.2f} of import torch")


if __name__ == "__main__":
    main()
