"""alignkit's SFT beside plain TRL: the same model, rows, order and settings; every run a process of its own, in turns.

::

    python benchmarks/sft_vs_trl.py --tuner lora --runs 3 --steps 10

The process of alignkit runs ``alignkit.run.execute``; TRL's is ``SFTTrainer`` as its documentation shows it, fed with
conversational prompt-completion rows. Both train without evaluation, checkpoints and gradient checkpointing, and are
watched by the same :class:`Meter`. Tokens are those of the attention mask. TRL also trains the newline that the chat
template writes after an answer's end, so its rows are one token longer; rows per second do not depend on that.
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
import trl
import trl.trainer.sft_trainer
from transformers import TrainerCallback, TrainerState

from alignkit import base, hookimpl
from alignkit.config import resolve
from alignkit.plan import Plan, make
from alignkit.registry import Plugin, Registry, installed

WARM_UP = 2  # steps that are not timed

Row = tuple[list[int], list[int]]  # input ids and labels


@dataclasses.dataclass
class Measured:
    """One run, up to the end of its last step: nothing is saved yet."""

    seconds: float  # of the steps after the warm-up
    peak: int  # bytes: of the device where there is one, else of the process
    losses: list[float]  # as logged, one a step
    batches: list[list[Row]]  # what was trained on, one a step

    def per_second(self, what: str) -> float:
        """``tokens`` or ``rows`` a second, after the warm-up."""
        rows = [row for batch in self.batches[WARM_UP:] for row in batch]
        return (len(rows) if what == "rows" else sum(len(ids) for ids, _ in rows)) / self.seconds


class Meter(TrainerCallback):
    """A callback for either trainer, and the plugin that hands itself to alignkit's."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.marks: list[float] = []

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        if state.global_step == state.max_steps:
            of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else of_process

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


def train_alignkit(plan: Plan) -> None:
    from alignkit.run import execute

    execute(plan, resume=False, overwrite=False, say=print)


def train_trl(plan: Plan) -> None:
    import peft
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
    collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling  # of both
    collate = collator.torch_call

    def noted(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
        meter.batches.append([(example["input_ids"], example["labels"]) for example in examples])
        return collate(self, examples)

    with tempfile.TemporaryDirectory() as output, mock.patch.object(collator, "torch_call", noted):
        {"alignkit": train_alignkit, "trl": train_trl}[options.side](plan_of(options, output))
    start, end = meter.marks
    batches = meter.batches[: options.steps]  # one more is fetched ahead
    measured = Measured(end - start, meter.peak, meter.losses, batches)
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
    """Whether both trained the same rows in the same order: TRL's may end with one token more, a trained one."""
    assert len(ours.batches) == len(theirs.batches) == len(ours.losses) == len(theirs.losses)
    for step, (our_rows, their_rows) in enumerate(zip(ours.batches, theirs.batches, strict=True), 1):
        for (ids, labels), (their_ids, their_labels) in zip(our_rows, their_rows, strict=True):
            n = len(ids)
            assert ids == their_ids[:n], f"step {step}: other tokens"
            assert labels == their_labels[:n], f"step {step}: other labels"
            assert their_labels[n:] == their_ids[n:], f"step {step}: other labels at the end"
            assert len(their_ids) <= n + 1, f"step {step}: TRL's row goes on"


def describe(side: str, m: Measured) -> str:
    rows = [row for batch in m.batches for row in batch]
    targets = sum(label != -100 for _, labels in rows for label in labels)
    return (
        f"{side:<9}{m.per_second('tokens'):>10.1f}{m.per_second('rows'):>8.2f}{m.peak / 2**20:>10.0f}"
        f"{sum(len(ids) for ids, _ in rows):>8}{targets:>9}   {' '.join(f'{loss:.3f}' for loss in m.losses)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of each side")
    parser.add_argument("--steps", type=int, default=10, help=f"of each run; the first {WARM_UP} are not timed")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--model", default="bundled:smollm2-135m", help="a folder, a hub id or a bundled name")
    parser.add_argument("--data", default="bundled:demonstrations", help="demonstrations with one answer a row")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--assert", dest="check", action="store_true", help="exit 1 if slower, or over 1.02 the memory")
    parser.add_argument("--side", choices=("alignkit", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be over {WARM_UP}")
    if options.side:
        return child(options)

    locate = "import sys; from alignkit import base; base.locate(sys.argv[1], print)"  # conversion is no part of a run
    subprocess.run([sys.executable, "-c", locate, options.model], check=True)
    print(f"{'':<9}{'tokens/s':>10}{'rows/s':>8}{'peak MiB':>10}{'tokens':>8}{'targets':>9}   loss of each step")
    pairs = []
    for _ in range(options.runs):
        pair = []
        for side in ("alignkit", "trl"):
            pair.append(run(side))
            print(describe(side, pair[-1]), flush=True)
        check_same(*pair)
        pairs.append(pair)

    print("\nalignkit / TRL, of neighbouring runs")
    medians = {}
    for name, value in {
        "tokens/s": lambda m: m.per_second("tokens"),
        "rows/s": lambda m: m.per_second("rows"),
        "peak memory": lambda m: m.peak,
    }.items():
        ratios = [value(ours) / value(theirs) for ours, theirs in pairs]
        medians[name] = statistics.median(ratios)
        print(f"{name:<12} median {medians[name]:.3f}   min {min(ratios):.3f}   max {max(ratios):.3f}")
    if options.check and (medians["tokens/s"] < 1.0 or medians["peak memory"] > 1.02):
        sys.exit(1)


if __name__ == "__main__":
    main()
