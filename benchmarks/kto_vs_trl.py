"""alignkit's KTO beside TRL's ``KTOTrainer``: the same model, answers, batches and settings; processes in turns.

::

    python benchmarks/kto_vs_trl.py --runs 3 --steps 8
    python benchmarks/kto_vs_trl.py --runs 3 --steps 8 --tuner full

Rows are the best answer of a bundled ranking, rated good, or the worst one of another, rated bad. Both sides train the
same batches in the same order, and start on the bare model. TRL also trains the newline that the chat template writes
after an answer's end, one token an answer. The script checks that both losses are 1/2 at the first step.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pairs

from alignkit import bundled
from alignkit.runs import locate_model

SIDES = ("alignkit", "trl")
WARM_UP = 1  # steps that are not timed
SEED = 42  # the default of both sides
Row = dict[str, Any]  # prompt, completion, label


def rows_of(options: argparse.Namespace) -> list[Row]:
    """As many rated answers as are trained on, good and bad in turn."""
    text = bundled.data("bundled:rankings").read_text(encoding="utf-8")
    rankings = [json.loads(line) for line in text.splitlines()]
    random.Random(SEED).shuffle(rankings)
    rows = []
    for ranking in rankings:
        by_rank = sorted(zip(ranking["ranks"], ranking["responses"], strict=True))
        if by_rank[0][0] < by_rank[-1][0]:
            good = len(rows) % 2 == 0
            rows.append({"prompt": ranking["prompt"], "completion": by_rank[0 if good else -1][1], "label": good})
    return rows[: options.steps * options.batch_size]


meter = pairs.Meter(WARM_UP)


def train_ours(options: argparse.Namespace, folder: str, rows: list[Row]) -> None:
    data = Path(folder) / "ratings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "plugins": ["kto", options.tuner],
        "model": options.model,
        "output": folder,
        "data": {"path": str(data), "eval_size": 0},
        "train": pairs.arguments(options),
        "stages": {"kto": {"policy": "base"}},
    }
    trainer, _ = pairs.alignkit_trainer(settings, meter)
    trainer.train()


def train_trl(options: argparse.Namespace, folder: str, rows: list[Row]) -> None:
    import trl
    from datasets import Dataset

    random.Random(SEED).shuffle(rows)  # as alignkit does; TRL trains rows in their order
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in rows
    ]
    model, adapter = pairs.trl_model(options)
    trl.KTOTrainer(
        model=locate_model(options.model, print),
        args=trl.KTOConfig(
            **pairs.arguments(options),
            output_dir=folder,
            max_length=None,
            model_init_kwargs=model,
        ),
        train_dataset=Dataset.from_list(conversations),
        peft_config=adapter,
        callbacks=[meter],
    ).train()


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    with tempfile.TemporaryDirectory() as folder:
        (train_trl if options.side == "trl" else train_ours)(options, folder, rows_of(options))
    numbers = {"seconds": meter.seconds, "CPU seconds": meter.cpu_seconds, "peak MiB": meter.peak}
    losses = {"first loss": meter.losses[0], "last loss": meter.losses[-1]}
    options.result.write_text(json.dumps({**numbers, **losses}), encoding="utf-8")


def main() -> None:
    parser = pairs.parser(__doc__, SIDES)
    parser.add_argument("--steps", type=int, default=8, help=f"of each run, over {WARM_UP}: so many are not timed")
    parser.add_argument("--batch-size", type=int, default=8, help="answers a step")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    options = parser.parse_args()
    if options.side:
        return child(options)

    def measure(side: str, turn: int) -> pairs.Numbers:
        numbers = pairs.measure(side)
        assert abs(numbers["first loss"] - 0.5) < 0.01, "the policy does not start at the reference"
        print(pairs.line(side, numbers), flush=True)
        return numbers

    pairs.convert(options.model)
    print(f"seconds are those of {options.steps - WARM_UP} steps")
    measured = pairs.in_turns(SIDES, options.runs, measure)
    for name in ("seconds", "CPU seconds"):  # the second is best on a shared machine
        print(pairs.spread(f"{name}, TRL / alignkit", pairs.ratios(measured["trl"], measured["alignkit"], name)))
    print(pairs.spread("peak MiB, alignkit / TRL", pairs.ratios(measured["alignkit"], measured["trl"], "peak MiB")))


if __name__ == "__main__":
    main()
