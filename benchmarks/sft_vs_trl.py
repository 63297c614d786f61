"""alignkit's SFT beside plain TRL: the same model, rows, order and settings; every run a process of its own, in turns.

::

    python benchmarks/sft_vs_trl.py --tuner lora --runs 3 --steps 10

The process of alignkit runs ``alignkit.training.execute``; TRL's is ``SFTTrainer`` as its documentation shows it,
fed with conversational prompt-completion rows. Both train without evaluation, checkpoints and gradient checkpointing,
and are watched by the same :class:`pairs.Meter`. Tokens are those of the attention mask. TRL also trains the newline
that the chat template writes after an answer's end, so its rows are one token longer; rows per second do not depend on
that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from importlib.metadata import EntryPoint
from typing import Any
from unittest import mock

import pairs

from alignkit import Plan
from alignkit.config import resolve
from alignkit.registry import Plugin, Registry, installed
from alignkit.runs import locate_model, make_plan

WARM_UP = 2  # steps that are not timed

Row = tuple[list[int], list[int]]  # input ids and labels


@dataclasses.dataclass
class Measured:
    """One run, up to the end of its last step: nothing is saved yet."""

    seconds: float  # of the steps after the warm-up
    cores: float  # that were at work meanwhile: fewer than elsewhere in the table, and the machine was shared
    peak: float  # MiB
    losses: list[float]  # as logged, one a step
    batches: list[list[Row]]  # what was trained on, one a step

    def rows(self, after: int = 0) -> list[Row]:
        return [row for batch in self.batches[after:] for row in batch]

    def numbers(self) -> dict[str, float]:
        """What is compared."""
        timed = self.rows(WARM_UP)
        tokens = sum(len(ids) for ids, _ in timed)
        return {"tokens/s": tokens / self.seconds, "rows/s": len(timed) / self.seconds, "peak MiB": self.peak}


meter = pairs.Meter(WARM_UP)
batches: list[list[Row]] = []  # as the collator gets them


def plan_of(options: argparse.Namespace, output: str) -> Plan:
    """The run of either side."""
    registry = Registry([*installed(), Plugin("meter", "benchmarks", "0", EntryPoint("meter", "__main__:meter", "-"))])
    train = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "bf16": True,
        **pairs.TRAIN,
    }
    data = {"path": options.data, "eval_size": 0}
    settings = {"plugins": ["sft", options.tuner, "meter"], "model": options.model, "output": output}
    return make_plan(registry, resolve(registry, {}, {**settings, "data": data, "train": train}))


def train_trl(plan: Plan) -> None:
    import peft
    import trl
    from datasets import Dataset

    tuner, config = plan.config.tuner
    lora = tuner.name == "lora"
    conversations = [located.row.messages for located in plan.train_rows]
    trl.SFTTrainer(
        model=locate_model(plan.config.model, print),
        args=trl.SFTConfig(
            **plan.config.train,
            output_dir=plan.config.output,
            max_length=None,
            model_init_kwargs={"dtype": "bfloat16" if lora else config.dtype},
        ),
        train_dataset=Dataset.from_list([{"prompt": c[:-1], "completion": c[-1:]} for c in conversations]),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM", **{k: v for k, v in dataclasses.asdict(config).items() if k != "dtype"}
        )
        if lora
        else None,
        callbacks=[meter],
    ).train()


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator  # either side uses it

    from alignkit.training import execute

    collate = Collator.torch_call

    def record(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batches.append([(example["input_ids"], example["labels"]) for example in examples])
        return collate(self, examples)

    with tempfile.TemporaryDirectory() as output, mock.patch.object(Collator, "torch_call", record):
        plan = plan_of(options, output)
        if options.side == "trl":
            train_trl(plan)
        else:
            execute(plan, resume=False, overwrite=False, say=print)
    trained = batches[: options.steps]  # one more is fetched ahead
    measured = Measured(meter.seconds, meter.cpu_seconds / meter.seconds, meter.peak, meter.losses, trained)
    options.result.write_text(json.dumps(dataclasses.asdict(measured)), encoding="utf-8")


def check_same(ours: Measured, theirs: Measured) -> None:
    """Check that both sides trained the same rows in the same order. TRL's may end with one more trained token."""
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
    parser = pairs.parser(__doc__, ("alignkit", "trl"))
    parser.add_argument("--steps", type=int, default=10, help=f"of each run, over {WARM_UP}: so many are not timed")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--data", default="bundled:demonstrations", help="demonstrations with one answer a row")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--assert", dest="check", action="store_true", help="exit 1 if slower, or over 1.02 the memory")
    options = parser.parse_args()
    if options.side:
        return child(options)

    runs: dict[str, Measured] = {}  # of this turn

    def measure(side: str, turn: int) -> pairs.Numbers:
        runs[side] = Measured(**pairs.measure(side))
        print_line(side, runs[side])
        if side == "trl":
            check_same(runs["alignkit"], runs["trl"])
        return runs[side].numbers()

    pairs.convert(options.model)
    print(" " * 9 + "  tokens/s    rows/s  peak MiB     cores  tokens  targets   loss of each step")
    measured = pairs.in_turns(("alignkit", "trl"), options.runs, measure)
    ratios = {name: pairs.ratios(measured["alignkit"], measured["trl"], name) for name in measured["trl"][0]}
    print("\nalignkit / TRL, of neighboring runs")
    for name, values in ratios.items():
        print(pairs.spread(name, values))
    slower, larger = statistics.median(ratios["tokens/s"]) < 1.0, statistics.median(ratios["peak MiB"]) > 1.02
    if options.check and (slower or larger):
        sys.exit(1)


if __name__ == "__main__":
    main()
