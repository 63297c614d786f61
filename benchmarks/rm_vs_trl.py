"""alignkit's reward model beside TRL's ``RewardTrainer``: the same model, rankings and settings; processes in turns.

::

    python benchmarks/rm_vs_trl.py --k 4 --strict --groups 16 --runs 3
    python benchmarks/rm_vs_trl.py --k 9 --strict --groups 6 --batch-size 1 --runs 2
    python benchmarks/rm_vs_trl.py --k 4 --groups 60 --held-out 60 --runs 3

TRL trains on the pairs of every ranking, alignkit on the rankings. One optimizer step of either holds the same
rankings: ``--batch-size`` of them here, their K(K-1)/2 pairs each there, so that an epoch is as many steps. Both sides
start the adapter and the head from the seed of the run, and see rows in an order of their own. ``--strict`` makes ties
into an order, so that every ranking has all its pairs, for times; ``--held-out`` compares the pairs of other
rankings that are ordered correctly after the epoch, and leaves ties as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pairs
import torch
import transformers

from alignkit import bundled
from alignkit.data import Branches
from alignkit.models import answer_scores, collate_separate, with_answer_scores
from alignkit.runs import locate_model

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


def train_ours(options: argparse.Namespace, folder: str, train: Groups) -> tuple[Any, Any]:
    """Train by alignkit's own trainer; the trained model and the tokenizer."""
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
    trainer, run = pairs.alignkit_trainer(settings, meter)
    trainer.train()
    return trainer.model, run.tokenizer


def train_trl(options: argparse.Namespace, folder: str, train: Groups) -> tuple[Any, Any]:
    """Train by TRL on every pair that is no tie."""
    import datasets
    import peft
    import trl

    from alignkit.data import load_tokenizer

    located = locate_model(options.model, print)
    tokenizer = load_tokenizer(located, None)
    rows = [
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
    per_group = len(rows) / len(train)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            **arguments(options, round(options.batch_size * per_group)), output_dir=folder, max_length=None
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if options.tuner == "lora" else None,
        callbacks=[meter],
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
        "seed": options.seed,
        **pairs.TRAIN,
    }


def encoded(tokenizer: Any, group: dict[str, Any]) -> Branches:
    """A ranking as ids, each answer with the token that ends it."""
    from alignkit.data import encode_answer

    prompt = [{"role": "user", "content": group["prompt"]}]
    rows = [encode_answer(tokenizer, prompt, answer, [tokenizer.eos_token_id]) for answer in group["responses"]]
    start = min(start for _, start in rows)
    return Branches(rows[0][0][:start], [ids[start:] for ids, _ in rows])


def pairs_of(tokenizer: Any, group: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Every pair of a ranking, the better first."""
    tree, ranks = encoded(tokenizer, group), group["ranks"]
    whole = [tree.prompt + answer for answer in tree.answers]
    number = range(len(whole))
    return [(whole[i], whole[j]) for i, j in itertools.permutations(number, 2) if ranks[i] < ranks[j]]


def accuracy(model: Any, tokenizer: Any, groups: Groups) -> float:
    """Pairwise accuracy on these rankings; ties have no pair."""
    model = with_answer_scores(model.eval())
    right = total = 0
    for group in groups:
        inputs = collate_separate([encoded(tokenizer, group)], tokenizer.pad_token_id)
        with torch.no_grad():
            scores = answer_scores(model, {name: t.to(model.device) for name, t in inputs.items()})
        for i, j in itertools.permutations(range(len(scores)), 2):
            if group["ranks"][i] < group["ranks"][j]:
                right, total = right + int(scores[i] > scores[j]), total + 1
    return right / total


meter = pairs.Meter(warm_up=1)


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    train, held_out = rankings(options.k, options.groups, options.held_out, options.strict)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = (train_trl if options.side == "trl" else train_ours)(options, folder, train)
    numbers = {"seconds": meter.seconds, "cores": meter.cpu_seconds / meter.seconds}
    if held_out:
        numbers["accuracy"] = accuracy(model, tokenizer, held_out)
    options.result.write_text(json.dumps(numbers), encoding="utf-8")


def main() -> None:
    parser = pairs.parser(__doc__, SIDES)
    parser.add_argument("--k", type=int, default=4, help="answers a prompt")
    parser.add_argument("--groups", type=int, default=24, help="rankings of the epoch")
    parser.add_argument("--strict", action="store_true", help="no ties: every ranking has all its pairs")
    parser.add_argument("--held-out", type=int, default=0, help="other rankings for the accuracy; 0: not measured")
    parser.add_argument("--batch-size", type=int, default=4, help="rankings an optimizer step")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    if options.side:
        return child(options)

    def measure(side: str, seed: int) -> pairs.Numbers:
        numbers = pairs.measure(side, "--seed", str(seed))
        print(pairs.line(side, numbers), flush=True)
        return numbers

    pairs.convert(options.model)
    print("seconds are from the end of the first step to the end of the epoch")
    measured = pairs.in_turns(options.sides, options.runs, measure)
    if trl := measured.get("trl"):
        print("\nTRL's seconds / alignkit's, of neighboring runs")
        for side in (side for side in options.sides if side != "trl"):
            print(pairs.spread(side, pairs.ratios(trl, measured[side], "seconds")))
    if options.held_out:
        print("\nheld-out accuracy")
        for side, runs in measured.items():
            values = [numbers["accuracy"] for numbers in runs]
            print(f"{side:<11} mean {statistics.mean(values):.3f}   min {min(values):.3f}   max {max(values):.3f}")


if __name__ == "__main__":
    main()
