"""alignkit's reward model beside TRL's ``RewardTrainer``: the same model, rankings and settings; processes in turns.

::

    python benchmarks/rm_vs_trl.py --k 4 --strict --groups 16 --runs 3
    python benchmarks/rm_vs_trl.py --k 9 --strict --groups 6 --batch-size 1 --runs 2
    python benchmarks/rm_vs_trl.py --k 4 --groups 60 --held-out 60 --runs 3

TRL trains on the pairs of every ranking, alignkit on the rankings. One optimizer step of either holds the same
rankings: ``--batch-size`` of them here, their K(K-1)/2 pairs each there, so that an epoch is as many steps. Both sides
start the adapter and the head from the seed of the run, and see rows in an order of their own. ``--strict`` makes ties
into an order, so that every ranking has all its pairs, for times; ``--held-out`` compares the share of pairs of other
rankings that is ordered rightly after the epoch, and leaves ties what they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from alignkit import bundled
from alignkit.data.encoding import Branches
from alignkit.models import branches
from alignkit.runs import base

SIDES = ("separate", "shared", "trl")
Groups = list[dict[str, Any]]  # prompt, responses, ranks


def rankings(k: int, number: int, held_out: int, strict: bool) -> tuple[Groups, Groups]:
    """``number`` rankings of exactly ``k`` answers, and others for the held-out figure.

    The bundled rankings have six answers at most; missing ones come from other prompts and rank last.
    """
    rows = [json.loads(line) for line in bundled.data("bundled:rankings").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    spare = itertools.cycle(answer for row in rows for answer in row["responses"])
    made = []
    for row in rows:
        order = sorted(range(len(row["responses"])), key=lambda i: row["ranks"][i])
        answers = [row["responses"][i] for i in order][:k]
        ranks = [row["ranks"][i] for i in order][:k]
        while len(answers) < k:
            answers.append(next(spare))
            ranks.append(max(ranks) + 1)
        ranks = list(range(k)) if strict else ranks
        if len(set(ranks)) > 1:
            made.append({"prompt": row["prompt"], "responses": answers, "ranks": ranks})
    return made[:number], made[number : number + held_out]


class Timer(transformers.TrainerCallback):
    """Seconds of the clock and of the CPU from the end of the first step to that of the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))


def ours(options: argparse.Namespace, folder: str, train: Groups) -> tuple[Any, Any]:
    """Train by alignkit's own trainer; the trained model and the tokenizer."""
    from alignkit.config import resolve
    from alignkit.registry import Registry
    from alignkit.runs.plan import make
    from alignkit.training.run import Run

    data = Path(folder) / "rankings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
    settings = {
        "plugins": ["rm", options.tuner],
        "model": options.model,
        "output": folder,
        "data": {"path": str(data), "eval_size": 0},
        "train": arguments(options, options.batch_size),
        "stages": {"rm": {"policy": "base", "shared_prompt": options.side == "shared"}},
    }
    registry = Registry()
    run = Run(make(registry, resolve(registry, {}, settings)), print)
    run.folder.mkdir(parents=True)
    trainer = run.config.stage.component.build(run)
    trainer.add_callback(timer)
    trainer.train()
    return trainer.model, run.tokenizer


def theirs(options: argparse.Namespace, folder: str, train: Groups) -> tuple[Any, Any]:
    """Train by TRL on every pair that is no tie."""
    import datasets
    import peft
    import trl

    from alignkit.data.chat_template import load_tokenizer

    located = base.locate(options.model, print)
    tokenizer = load_tokenizer(located, None)
    pairs = [
        dict(zip(("prompt_length", "chosen_ids", "rejected_ids"), (0, *ids), strict=True))
        for group in train
        for ids in pairs_of(tokenizer, group)
    ]
    transformers.set_seed(options.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        located, num_labels=1, dtype=torch.bfloat16 if options.tuner == "lora" else torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.normal_(std=(model.config.hidden_size + 1) ** -0.5)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["score"]
    )
    per_group = len(pairs) / len(train)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            **arguments(options, round(options.batch_size * per_group)), output_dir=folder, max_length=None
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora if options.tuner == "lora" else None,
        callbacks=[timer],
    )
    trainer.train()
    return trainer.model, tokenizer


def arguments(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    return {
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": options.seed,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
    }


def encoded(tokenizer: Any, group: dict[str, Any]) -> Branches:
    """A ranking as ids, each answer with the token that ends it."""
    from alignkit.data.chat_template import encode_answer

    prompt = [{"role": "user", "content": group["prompt"]}]
    rows = [encode_answer(tokenizer, prompt, answer, [tokenizer.eos_token_id]) for answer in group["responses"]]
    start = min(start for _, start in rows)
    return Branches(rows[0][0][:start], [ids[start:] for ids, _ in rows])


def pairs_of(tokenizer: Any, group: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Every pair of a ranking, the better first."""
    both, ranks = encoded(tokenizer, group), group["ranks"]
    whole = [both.prompt + answer for answer in both.answers]
    number = range(len(whole))
    return [(whole[i], whole[j]) for i, j in itertools.permutations(number, 2) if ranks[i] < ranks[j]]


def accuracy(model: Any, tokenizer: Any, groups: Groups) -> float:
    """The share of pairs that the model orders rightly."""
    model = branches.with_answer_scores(model.eval())
    right = total = 0
    for group in groups:
        inputs = branches.collate_separate([encoded(tokenizer, group)], tokenizer.pad_token_id)
        with torch.no_grad():
            scores = branches.answer_scores(model, {name: t.to(model.device) for name, t in inputs.items()})
        for i, j in itertools.permutations(range(len(scores)), 2):
            if group["ranks"][i] < group["ranks"][j]:
                right, total = right + int(scores[i] > scores[j]), total + 1
    return right / total


timer = Timer()


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    train, held_out = rankings(options.k, options.groups, options.held_out, options.strict)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = (theirs if options.side == "trl" else ours)(options, folder, train)
    (wall, cpu), (wall_end, cpu_end) = timer.marks
    found = {"seconds": wall_end - wall, "cores": (cpu_end - cpu) / (wall_end - wall)}
    if held_out:
        found["accuracy"] = accuracy(model, tokenizer, held_out)
    options.result.write_text(json.dumps(found), encoding="utf-8")


def measure(side: str, seed: int) -> dict[str, float]:
    """This script again, as a process that trains one side."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:]]
        command += ["--side", side, "--seed", str(seed), "--result", str(result)]
        environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout}{done.stderr}")
        return dict(json.loads(result.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--k", type=int, default=4, help="answers a prompt")
    parser.add_argument("--groups", type=int, default=24, help="rankings of the epoch")
    parser.add_argument("--strict", action="store_true", help="no ties: every ranking has all its pairs")
    parser.add_argument("--held-out", type=int, default=0, help="other rankings for the accuracy; 0: not measured")
    parser.add_argument("--batch-size", type=int, default=4, help="rankings an optimizer step")
    parser.add_argument("--runs", type=int, default=3, help="of each side, each with a seed of its own")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--model", default="bundled:smollm2-135m", help="a folder, a hub id or a bundled name")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return child(options)

    locate = "import sys; from alignkit.runs import base; base.locate(sys.argv[1], print)"
    subprocess.run([sys.executable, "-c", locate, options.model], check=True)  # converted before anything is measured
    print("seconds are from the end of the first step to the end of the epoch")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for seed in range(options.runs):
        for side in options.sides:
            found[side].append(one := measure(side, seed))
            print(f"{side:<9}", "  ".join(f"{name} {value:.3f}" for name, value in one.items()), flush=True)
    print("\nTRL's seconds / alignkit's, of neighbouring runs")
    for side in (side for side in options.sides if side != "trl" and "trl" in options.sides):
        ratios = [trl["seconds"] / mine["seconds"] for mine, trl in zip(found[side], found["trl"], strict=True)]
        print(f"{side:<9} median {statistics.median(ratios):.2f}   min {min(ratios):.2f}   max {max(ratios):.2f}")
    if options.held_out:
        print("\nheld-out accuracy")
        for side, runs in found.items():
            values = [run["accuracy"] for run in runs]
            print(f"{side:<9} mean {statistics.mean(values):.3f}   min {min(values):.3f}   max {max(values):.3f}")


if __name__ == "__main__":
    main()
