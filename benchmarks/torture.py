"""Kills and disturbs runs of every stage and tuner at random moments, and compares the results bit for bit.

    python benchmarks/torture.py --kills 300 --disturbances 80 --seed 0
    python benchmarks/torture.py --kills 20 --stages sft ppo --tuners lora --output results.jsonl

A run is killed with SIGKILL after a random time, or at a random one of the file operations with which it writes,
renames and removes, at once or up to 5 ms later. A resume is sometimes killed too. Then the run is resumed to its end,
and its folder is compared with that of an uninterrupted run: weights, optimizer, random states, metrics, answers and
manifest, and no file may be left over. Other runs are disturbed by a full disk, a read-only folder, a clock that jumps,
or a second process (``tests/disturbances.py``), and compared in the same way. ``--output`` is continued where it ends.
Exit status 1 if a run differs.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from disturbances import DISTURBANCES  # noqa: E402
from torturing import STAGES, TUNERS, Ended, Moment, command, differences, prepare, words  # noqa: E402

AGAIN = 0.25  # of the resumes are killed too
REPLACES = 0.15  # of the runs replace a finished one, with --overwrite


class Torture:
    """Kills, and the uninterrupted runs to compare with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole: dict[tuple[str, str], Ended] = {}

    def folder(self, stage: str, tuner: str) -> Path:
        """The folder in which the uninterrupted run was trained."""
        return self.root / "whole" / f"{stage}-{tuner}"

    def uninterrupted(self, stage: str, tuner: str) -> Ended:
        """How the uninterrupted run ended."""
        if (stage, tuner) not in self.whole:
            ended = command(words(self.root, stage, tuner), self.folder(stage, tuner))
            if ended.status:
                sys.exit(f"{stage} with {tuner} cannot be trained: {ended.output}")
            self.whole[stage, tuner] = ended
        return self.whole[stage, tuner]

    def moment(self, draw: random.Random, whole: Ended) -> Moment:
        """A random moment in a run that takes as long as ``whole``."""
        if draw.random() < 0.5:
            return Moment(draw.uniform(0, whole.seconds))
        return Moment(draw.choice([0.0, draw.uniform(0, 0.005)]), draw.randint(1, whole.operations))

    def kill(self, number: int, seed: int, stage: str, tuner: str) -> dict[str, Any]:
        """Kill a run until a resume of it is not killed, and compare it. The random moments depend on the numbers."""
        draw, whole, folder = random.Random(f"{seed} {number}"), self.uninterrupted(stage, tuner), self.root / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        given, flags, moments, faults = words(self.root, stage, tuner), list[str](), list[str](), list[str]()
        if draw.random() < REPLACES:
            shutil.copytree(self.folder(stage, tuner) / "runs", folder / "runs")
            flags = ["--overwrite"]
        given_flags, kills, started = list(flags), 0, time.monotonic()
        while True:
            is_killed = not kills or draw.random() < AGAIN
            moment = self.moment(draw, whole) if is_killed else None
            ended = command([*given, *flags], folder, moment)
            if ended.was_killed:
                kills += 1
                moments.append(f"{moment}{f': {ended.last}' if moment and moment.event else ''}")
                flags = [*given_flags, "--resume"]
                continue
            if moment is not None and not ended.status:  # it had already ended
                moments.append(f"{moment}: after the end")
                flags = [*given_flags, "--resume"]
                kills += 1
                continue
            break
        if ended.status:
            faults.append(f"exit status {ended.status}: {ended.output.strip()[-400:]}")
        else:
            faults += differences(self.folder(stage, tuner) / "runs", folder / "runs")
        result = {"number": number, "seed": seed, "stage": stage, "tuner": tuner, "kills": kills, "moments": moments}
        return {**result, "seconds": round(time.monotonic() - started, 1), "faults": faults}

    def disturb(self, number: int, seed: int, stage: str, tuner: str) -> dict[str, Any]:
        """Disturb a run, and compare it. Each disturbance has its turn; its random moments depend on the numbers."""
        draw, whole, folder = random.Random(f"{seed} {number}"), self.uninterrupted(stage, tuner), self.root / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        started, name = time.monotonic(), list(DISTURBANCES)[number % len(DISTURBANCES)]
        given = words(self.root, stage, tuner)
        faults = DISTURBANCES[name](given, folder, self.folder(stage, tuner), whole, draw)
        result = {"number": number, "seed": seed, "stage": stage, "tuner": tuner, "disturbance": name, "kills": 0}
        return {**result, "seconds": round(time.monotonic() - started, 1), "faults": faults}


def table(results: list[dict[str, Any]]) -> str:
    """The kills by stage and tuner, the runs by disturbance, and how many of them differ."""
    kills: collections.Counter[tuple[str, str]] = collections.Counter()
    faulty: collections.Counter[tuple[str, str]] = collections.Counter()
    disturbed = [result for result in results if "disturbance" in result]
    for result in results:
        kills[result["stage"], result["tuner"]] += result["kills"]
        faulty[result["stage"], result["tuner"]] += bool(result["faults"])
    tuners = [tuner for tuner in TUNERS if any(key[1] == tuner for key in kills)]
    lines = ["| stage | " + " | ".join(tuners) + " |", "|---" * (len(tuners) + 1) + "|"]
    for stage in dict.fromkeys(result["stage"] for result in results):
        cells = (f"{kills[stage, t]} kills, {faulty[stage, t]} runs differ" for t in tuners)
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    for name in DISTURBANCES if disturbed else ():
        of_kind = [bool(result["faults"]) for result in disturbed if result["disturbance"] == name]
        lines.append(f"{name}: {len(of_kind)} runs, {sum(of_kind)} differ")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--disturbances", type=int, default=0, help="runs that are disturbed in other ways, after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--tuners", nargs="+", choices=TUNERS, default=TUNERS)
    parser.add_argument("--output", type=Path, help="a JSONL file of results, which is continued if it exists")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if _exists(options.output) else []
    results = [result for result in done if result["seed"] == options.seed]
    root = Path(tempfile.mkdtemp(prefix="alignkit-torture-"))
    started = time.monotonic()
    try:
        prepare(root)
        torture = Torture(root)
        pairs = list(itertools.product(options.stages, options.tuners))
        random.Random(options.seed).shuffle(pairs)
        for number in itertools.count(len(results)):
            disturbed = sum("disturbance" in result for result in results)
            is_kill = sum(result["kills"] for result in results) < options.kills
            if not is_kill and disturbed >= options.disturbances:
                break
            if time.monotonic() - started > options.minutes * 60:
                break
            pair = pairs[number % len(pairs)]
            if is_kill:
                result = torture.kill(number, options.seed, *pair)
            else:
                result = torture.disturb(disturbed, options.seed, *pair)
            results.append(result)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            if result["faults"]:
                print(json.dumps(result, indent=1), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    faulty = [result for result in results if result["faults"]]
    print(table(results))
    kills, seconds = sum(result["kills"] for result in results), time.monotonic() - started
    print(f"\n{kills} kills of {len(results)} runs in {seconds:.0f} s, seed {options.seed}: {len(faulty)} runs differ")
    sys.exit(1 if faulty else 0)


def _exists(file: Path | None) -> bool:
    return file is not None and file.exists()


if __name__ == "__main__":
    main()
