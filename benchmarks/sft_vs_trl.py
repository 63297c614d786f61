"""alignkit's SFT beside plain TRL: the same model, rows, order and settings; every run a process of its own, in turns.

::

    python benchmarks/sft_vs_trl.py --tuner lora --runs 3 --steps 10

The process of alignkit runs ``alignkit.training.execute``; TRL's is ``SFTTrainer`` as its documentation shows it,
fed with conversational prompt-completion rows. Both train without evaluation, checkpoints and gradient checkpointing,
and are watched by the same :class:`Meter`. Tokens are those of the attention mask. TRL also trains the newline that the
chat template writes after an answer's end, so its rows are one token longer; rows per second do not depend on that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback, TrainerState

from alignkit import hookimpl
from alignkit.config import resolve
from alignkit.registry import Plugin, Registry, installed
from alignkit.runs import base
from alignkit.runs.plan import Plan, make

WARM_UP = 2  # steps that are not timed

Row = tuple[list[int], list[int]]  # input ids and labels


@dataclasses.dataclass
class Measured:
    """One run, up to the end of its last step: nothing is saved yet."""

    seconds: float  # of the steps after the warm-up
    cores: float  # that were at work meanwhile: fewer than elsewhere in the table, and the machine was shared
    peak: int  # bytes: of the device where there is one, else of the process
    losses: list[float]  # as logged, one a step
    batches: list[list[Row]]  # what was trained on, one a step

    def rows(self, after: int = 0) -> list[Row]:
        return [row for batch in self.batches[after:] for row in batch]

    def numbers(self) -> dict[str, float]:
        """What is compared."""
        timed = self.rows(WARM_UP)
        tokens = sum(len(ids) for ids, _ in timed)
        return {"tokens/s": tokens / self.seconds, "rows/s": len(timed) / self.seconds, "peak MiB": self.peak / 2**20}


class Meter(TrainerCallback):
    """A callback for either trainer, and the plugin that hands itself to alignkit's."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.marks: list[tuple[float, float]] = []  # seconds of the clock and of the CPU

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))
        if state.global_step == state.max_steps:
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux; macOS would say bytes
            self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else kilobytes * 1024

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.losses = [log["loss"] for log in state.log_history if "loss" in log]


meter = Meter()


def plan_of(options: argparse.Namespace, output: str) -> Plan:
    """The run that both sides do."""
    registry = Registry([*installed(), Plugin("meter", "benchmarks", "0", EntryPoint("meter", "__main__:meter", "-"))])
    train = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "bf16": True,
        "use_cpu": not torch.accelerator.is_available(),  # TRL refuses bf16 on a CPU that it did not ask for
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
    }
    data = {"path": options.data, "eval_size": 0}
    settings = {"plugins": ["sft", options.tuner, "meter"], "model": options.model, "output": output}
    return make(registry, resolve(registry, {}, {**settings, "data": data, "train": train}))


def train_trl(plan: Plan) -> None:
    import peft
    import trl
    from datasets import Dataset

    tuner, config = plan.config.tuner
    lora = tuner.name == "lora"
    conversations = [located.row.messages for located in plan.train_rows]
    trl.SFTTrainer(
        model=base.locate(plan.config.model, print),
        args=trl.SFTConfig(
            **plan.config.train,
            output_dir=plan.config.output,
            max_length=None,
            model_init_kwargs={"dtype": "bfloat16" if lora else config.dtype},
        ),
        train_dataset=Dataset.from_list([{"prompt": c[:-1], "completion": c[-1:]} for c in conversations]),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **dataclasses.asdict(config)) if lora else None,
        callbacks=[meter],
    ).train()


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator  # of both

    from alignkit.training import execute

    collate = Collator.torch_call

    def noted(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
        meter.batches.append([(example["input_ids"], example["labels"]) for example in examples])
        return collate(self, examples)

    with tempfile.TemporaryDirectory() as output, mock.patch.object(Collator, "torch_call", noted):
        plan = plan_of(options, output)
        if options.side == "trl":
            train_trl(plan)
        else:
            execute(plan, resume=False, overwrite=False, say=print)
    batches = meter.batches[: options.steps]  # one more is fetched ahead
    seconds, cpu_seconds = (end - start for start, end in zip(*meter.marks, strict=True))
    measured = Measured(seconds, cpu_seconds / seconds, meter.peak, meter.losses, batches)
    options.result.write_text(json.dumps(dataclasses.asdict(measured)), encoding="utf-8")


def run(side: str) -> Measured:
    """This script again, as a process that trains one side."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--result", str(result)]
        environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout}{done.stderr}")
        return Measured(**json.loads(result.read_text(encoding="utf-8")))


def check_same(ours: Measured, theirs: Measured) -> None:
    """That both trained the same rows in the same order; TRL's may end with one more token, which is trained."""
    for (ids, labels), (their_ids, their_labels) in zip(ours.rows(), theirs.rows(), strict=True):
        n = len(ids)
        assert len(their_ids) in (n, n + 1)
        assert (ids, labels) == (their_ids[:n], their_labels[:n])
        assert their_ids[n:] == their_labels[n:]
    # the first loss is the same model's: as a sum, TRL's has those tokens on top (1 % is for rounding to bf16)
    assert ours.losses[0] * targets(ours.batches[0]) < 1.01 * theirs.losses[0] * targets(theirs.batches[0])


def targets(rows: list[Row]) -> int:
    return sum(label != -100 for _, labels in rows for label in labels)


def print_line(side: str, m: Measured) -> None:
    columns = {**m.numbers(), "cores": m.cores}
    counts = f"{sum(len(ids) for ids, _ in m.rows()):>8}{targets(m.rows()):>9}"
    losses = " ".join(f"{loss:.3f}" for loss in m.losses)
    print(f"{side:<9}" + "".join(f"{value:>10.2f}" for value in columns.values()) + f"{counts}   {losses}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of each side")
    parser.add_argument("--steps", type=int, default=10, help=f"of each run, over {WARM_UP}: so many are not timed")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--model", default="bundled:smollm2-135m", help="a folder, a hub id or a bundled name")
    parser.add_argument("--data", default="bundled:demonstrations", help="demonstrations with one answer a row")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--assert", dest="check", action="store_true", help="exit 1 if slower, or over 1.02 the memory")
    parser.add_argument("--side", choices=("alignkit", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return child(options)

    locate = "import sys; from alignkit.runs import base; base.locate(sys.argv[1], print)"
    subprocess.run([sys.executable, "-c", locate, options.model], check=True)  # converted before anything is measured
    print(" " * 9 + "  tokens/s    rows/s  peak MiB     cores  tokens  targets   loss of each step")
    ratios: dict[str, list[float]] = {}
    for _ in range(options.runs):
        print_line("alignkit", ours := run("alignkit"))
        print_line("trl", theirs := run("trl"))
        check_same(ours, theirs)
        for name, value in ours.numbers().items():
            ratios.setdefault(name, []).append(value / theirs.numbers()[name])

    print("\nalignkit / TRL, of neighbouring runs")
    for name, values in ratios.items():
        print(f"{name:<9} median {statistics.median(values):.3f}   min {min(values):.3f}   max {max(values):.3f}")
    slower, larger = statistics.median(ratios["tokens/s"]) < 1.0, statistics.median(ratios["peak MiB"]) > 1.02
    sys.exit(1 if options.check and (slower or larger) else 0)


if __name__ == "__main__":
    main()
