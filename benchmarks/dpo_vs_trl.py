"""alignkit's DPO beside TRL's ``DPOTrainer``: the same model, pairs, order and settings; processes in turns.

::

    python benchmarks/dpo_vs_trl.py --runs 3 --steps 8
    python benchmarks/dpo_vs_trl.py --runs 3 --steps 8 --even

Rows are the best and the worst answer of the bundled rankings. With ``--even`` every prompt is as long as the answers
are on average. Both sides have a fresh adapter on the bare model, whose reference is the model without it. TRL also
trains the newline that the chat template writes after an answer's end, one token an answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pairs

from alignkit import bundled
from alignkit.runs import locate_model

SIDES = ("separate", "shared", "trl")
WARM_UP = 1  # steps that are not timed
Row = dict[str, str]  # prompt, chosen, rejected


def rows_of(options: argparse.Namespace, tokenizer: Any) -> list[Row]:
    """As many pairs as are trained on."""
    text = bundled.data("bundled:rankings").read_text(encoding="utf-8")
    rankings = [json.loads(line) for line in text.splitlines()]
    random.Random(0).shuffle(rankings)
    rows = []
    for ranking in rankings:
        by_rank = sorted(zip(ranking["ranks"], ranking["responses"], strict=True))
        if by_rank[0][0] < by_rank[-1][0]:
            rows.append({"prompt": ranking["prompt"], "chosen": by_rank[0][1], "rejected": by_rank[-1][1]})
    rows = rows[: options.steps * options.batch_size]
    if options.even:
        filler = itertools.cycle(tokens(tokenizer, " ".join(row["chosen"] for row in rows)))
        for row in rows:
            answers = (len(tokens(tokenizer, row["chosen"])) + len(tokens(tokenizer, row["rejected"]))) / 2
            missing = max(0, round(answers) - len(asked(tokenizer, row["prompt"])))
            row["prompt"] = f"{tokenizer.decode(list(itertools.islice(filler, missing)))} {row['prompt']}".strip()
    return rows


def tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def asked(tokenizer: Any, prompt: str) -> list[int]:
    from alignkit.data import prompt_ids

    return prompt_ids(tokenizer, [{"role": "user", "content": prompt}])


meter = pairs.Meter(WARM_UP)


def train_ours(options: argparse.Namespace, folder: str, rows: list[Row]) -> None:
    data = Path(folder) / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "plugins": ["dpo", options.tuner],
        "model": options.model,
        "output": folder,
        "data": {"path": str(data), "eval_size": 0},
        "train": pairs.arguments(options),
        "stages": {"dpo": {"policy": "base", "shared_prompt": options.side == "shared"}},
    }
    trainer, _ = pairs.alignkit_trainer(settings, meter)
    trainer.train()


def train_trl(options: argparse.Namespace, folder: str, rows: list[Row]) -> None:
    import trl
    from datasets import Dataset

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    model, adapter = pairs.trl_model(options)
    conversations = [
        {name: message("user" if name == "prompt" else "assistant", text) for name, text in row.items()} for row in rows
    ]
    trl.DPOTrainer(
        model=locate_model(options.model, print),
        args=trl.DPOConfig(
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
    from alignkit.data import load_tokenizer

    rows = rows_of(options, load_tokenizer(locate_model(options.model, print), None))
    with tempfile.TemporaryDirectory() as folder:
        (train_trl if options.side == "trl" else train_ours)(options, folder, rows)
    numbers = {"seconds": meter.seconds, "CPU seconds": meter.cpu_seconds, "peak MiB": meter.peak}
    options.result.write_text(json.dumps({**numbers, "first loss": meter.losses[0]}), encoding="utf-8")


def main() -> None:
    parser = pairs.parser(__doc__, SIDES)
    parser.add_argument("--steps", type=int, default=8, help=f"of each run, over {WARM_UP}: so many are not timed")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--even", action="store_true", help="prompts as long as the answers")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    if options.side:
        return child(options)

    def measure(side: str, turn: int) -> pairs.Numbers:
        numbers = pairs.measure(side)
        print(pairs.line(side, numbers), flush=True)
        return numbers

    pairs.convert(options.model)
    print(f"seconds are those of {options.steps - WARM_UP} steps")
    measured = pairs.in_turns(options.sides, options.runs, measure)
    trl = measured.pop("trl", None)
    for name in ("seconds", "CPU seconds", "peak MiB") if trl else ():  # the second is best on a shared machine
        slower = "seconds" in name
        print(f"\n{name}, {'TRL / alignkit' if slower else 'alignkit / TRL'}, of neighboring runs")
        for side, ours in measured.items():
            print(pairs.spread(side, pairs.ratios(trl, ours, name) if slower else pairs.ratios(ours, trl, name)))


if __name__ == "__main__":
    main()
