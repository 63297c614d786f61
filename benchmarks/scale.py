"""Two processes with a core each compared with one process: tokens per second of SFT and PPO, and frozen weights.

::

    python benchmarks/scale.py --runs 3
    python benchmarks/scale.py --runs 1 --shard fsdp2

Both train the same number of rows per step. Each process is bound to a core of its own and computes with one thread, so
two processes have twice the cores. Tokens of SFT are those of the rows; tokens of PPO are those that are sampled and
trained on. The first step, loading, evaluation and saving are left out. ``tokens/s`` includes all communication, and
means something on cores that no other program uses. ``tokens/CPU s`` divides by the CPU time of the busiest process
instead: it leaves out the time that processes wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pairs

from alignkit import hookimpl
from alignkit.config import resolve
from alignkit.registry import Plugin, Registry, installed
from alignkit.runs import make_plan

STAGES = ("sft", "ppo")
SIDES = [f"{stage}-{processes}" for stage in STAGES for processes in (1, 2)]
SPEEDS = ("tokens/s", "tokens/CPU s")
TARGET = 1.6  # times the tokens per second of one process


class Meter(pairs.Meter):
    """As :class:`pairs.Meter`; also the tokens of the timed steps, and the frozen weights of this process."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        frozen = [p for p in kwargs["model"].parameters() if not p.requires_grad]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
        self.frozen = sum(p.numel() * p.element_size() for p in local) / 2**20

    def tokens(self, stage: str, batch: int) -> float:
        if stage == "sft":
            seen = [log["num_tokens"] for log in self.logs if "loss" in log]
            return seen[-1] - seen[self.warm_up - 1]
        return sum(log["length"] * batch for log in self.logs if "loss" in log and log["step"] > self.warm_up)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs = state.log_history


meter = Meter(1)


class MeterPlugin:
    """Adds :data:`meter` to a run."""

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[Any]:
        return [meter]


plugin = MeterPlugin()


def settings(options: argparse.Namespace, stage: str, processes: int, output: str) -> dict[str, Any]:
    """The config of a run: the same rows per step, whatever the number of processes."""
    batch = {"per_device_train_batch_size": options.batch_size // processes}
    train = {key: value for key, value in pairs.TRAIN.items() if stage == "sft" or not key.startswith(("log", "eval"))}
    train |= {
        "use_cpu": True,
        "max_steps": options.steps,
        **batch,
        **({"shard": options.shard} if options.shard and processes > 1 else {}),
    }
    table: dict[str, Any] = {"data": {"eval_size": 0}, "train": train}
    if stage == "ppo":
        del train["max_steps"]
        ppo = {"iterations": options.steps, "batch_size": options.batch_size, "minibatches": 1, "policy": "base"}
        table["ppo"] = {**ppo, "response_length": options.response_length, "temperature": 1.0}
        table["reward"] = {"name": "function", "call": "scale:length"}
    named = {"plugins": [stage, "lora", "meter"], "model": options.model, "output": output}
    return {**named, **table}


def length(prompts: list[Any], answers: list[str]) -> list[float]:
    """The reward of PPO, which costs nothing."""
    return [len(answer) / 100 for answer in answers]


def child(options: argparse.Namespace) -> None:
    """Train in one of the processes of a side, and write what it measured to a file in the folder ``--result``."""
    from alignkit.training import execute

    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    stage = options.side.partition("-")[0]
    registry = Registry([*installed(), Plugin("meter", "benchmarks", "0", EntryPoint("meter", "__main__:plugin", "-"))])
    output = os.environ["SCALE_OUTPUT"]
    plan = make_plan(registry, resolve(registry, {}, settings(options, stage, processes, output)))
    execute(plan, resume=False, overwrite=True, say=lambda line: None)
    numbers = {
        "processes": processes,
        "tokens": meter.tokens(stage, options.batch_size),
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu_seconds,
        "frozen": meter.frozen,
    }
    (options.result / f"{rank}.json").write_text(json.dumps(numbers), encoding="utf-8")


def measure(side: str) -> pairs.Numbers:
    """The numbers of a side, whose processes ``torch.distributed.run`` starts."""
    processes = int(side.rpartition("-")[2])
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCALE_OUTPUT": folder, "PYTHONPATH": path}
        command = [*launcher, *sys.argv, "--side", side, "--result", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{side} failed:\n{done.stdout}{done.stderr}")
        ranks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("[01].json"))]
    assert [rank["processes"] for rank in ranks] == [processes] * processes
    tokens, cpu = ranks[0]["tokens"], max(rank["cpu_seconds"] for rank in ranks)
    frozen = max(rank["frozen"] for rank in ranks)
    numbers = {"tokens/s": tokens / ranks[0]["seconds"], "tokens/CPU s": tokens / cpu, "frozen MiB": frozen}
    print(f"{side:<8}" + "".join(f"{value:>14.1f}" for value in numbers.values()), flush=True)
    return numbers


def main() -> None:
    parser = pairs.parser(__doc__, SIDES)
    parser.add_argument("--steps", type=int, default=6, help="of each run; the first is not timed")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="rows or answers per step, of all processes together"
    )
    parser.add_argument("--response-length", type=int, default=48, help="maximum tokens of an answer of PPO")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--shard", choices=["fsdp2"], help="shard the weights over the two processes")
    options = parser.parse_args()
    if options.side:
        return child(options)

    pairs.convert(options.model)
    print(" " * 8 + "".join(f"{name:>14}" for name in (*SPEEDS, "frozen MiB")))
    sides = [side for side in SIDES if side.partition("-")[0] in options.stages]
    measured = pairs.in_turns(sides, options.runs, lambda side, turn: measure(side))
    print("\ntwo processes / one, of neighboring runs")
    for stage in options.stages:
        for name in (*SPEEDS, "frozen MiB"):
            values = pairs.ratios(measured[f"{stage}-2"], measured[f"{stage}-1"], name)
            print(pairs.spread(f"{stage} {name}", values))
            if name in SPEEDS and statistics.median(values) < TARGET:
                print(f"  below the target of {TARGET}")


if __name__ == "__main__":
    main()
