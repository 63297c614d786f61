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
import os
import random
import resource
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
from alignkit.models import device
from alignkit.runs import base

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
    from alignkit.data.chat_template import prompt_ids

    return prompt_ids(tokenizer, [{"role": "user", "content": prompt}])


class Meter(transformers.TrainerCallback):
    """Seconds of the clock and of the CPU from the end of the warm-up to that of the last step, and peak memory."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))
        if state.global_step == state.max_steps:
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux; macOS would say bytes
            self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else kilobytes * 1024

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = [log["loss"] for log in state.log_history if "loss" in log]


meter = Meter()


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "bf16": device.run_dtype({}) is torch.bfloat16,
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
    }


def train_ours(options: argparse.Namespace, folder: str, rows: list[Row]) -> None:
    from alignkit.config import resolve
    from alignkit.registry import Registry
    from alignkit.runs.plan import make
    from alignkit.training.run import Run

    data = Path(folder) / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "plugins": ["dpo", options.tuner],
        "model": options.model,
        "output": folder,
        "data": {"path": str(data), "eval_size": 0},
        "train": arguments(options),
        "stages": {"dpo": {"policy": "base", "shared_prompt": options.side == "shared"}},
    }
    registry = Registry()
    run = Run(make(registry, resolve(registry, {}, settings)), print)
    run.folder.mkdir(parents=True)
    trainer = run.config.stage.component.build(run)
    trainer.add_callback(meter)
    trainer.train()


def train_trl(options: argparse.Namespace, folder: str, rows: list[Row]) -> None:
    import peft
    import trl
    from datasets import Dataset

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    lora = options.tuner == "lora"
    pairs = [
        {name: said("user" if name == "prompt" else "assistant", text) for name, text in row.items()} for row in rows
    ]
    trl.DPOTrainer(
        model=base.locate(options.model, print),
        args=trl.DPOConfig(
            **arguments(options),
            output_dir=folder,
            max_length=None,
            model_init_kwargs={"dtype": device.run_dtype({}) if lora else torch.float32},
        ),
        train_dataset=Dataset.from_list(pairs),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        if lora
        else None,
        callbacks=[meter],
    ).train()


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    from alignkit.data.chat_template import load_tokenizer

    rows = rows_of(options, load_tokenizer(base.locate(options.model, print), None))
    with tempfile.TemporaryDirectory() as folder:
        (train_trl if options.side == "trl" else train_ours)(options, folder, rows)
    (wall, cpu), (wall_end, cpu_end) = meter.marks
    found = {"seconds": wall_end - wall, "CPU seconds": cpu_end - cpu, "peak MiB": meter.peak / 2**20}
    options.result.write_text(json.dumps({**found, "first loss": meter.losses[0]}), encoding="utf-8")


def measure(side: str) -> dict[str, float]:
    """This script again, as a process that trains one side."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--result", str(result)]
        environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout}{done.stderr}")
        return dict(json.loads(result.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of each side")
    parser.add_argument("--steps", type=int, default=8, help=f"of each run, over {WARM_UP}: so many are not timed")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--even", action="store_true", help="prompts as long as the answers")
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--model", default="bundled:smollm2-135m", help="a folder, a hub id or a bundled name")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return child(options)

    locate = "import sys; from alignkit.runs import base; base.locate(sys.argv[1], print)"
    subprocess.run([sys.executable, "-c", locate, options.model], check=True)  # converted before anything is measured
    print(f"seconds are those of {options.steps - WARM_UP} steps")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.runs):
        for side in options.sides:
            found[side].append(one := measure(side))
            print(f"{side:<9}", "  ".join(f"{name} {value:.3f}" for name, value in one.items()), flush=True)
    for what in ("seconds", "CPU seconds", "peak MiB"):  # the second says most where the machine is shared
        slower = "seconds" in what
        print(f"\n{what}, {'TRL / alignkit' if slower else 'alignkit / TRL'}, of neighbouring runs")
        for side in (side for side in options.sides if side != "trl" and "trl" in options.sides):
            pairs = [(mine[what], trl[what]) for mine, trl in zip(found[side], found["trl"], strict=True)]
            ratios = [trl / mine if slower else mine / trl for mine, trl in pairs]
            print(f"{side:<9} median {statistics.median(ratios):.2f}   min {min(ratios):.2f}   max {max(ratios):.2f}")


if __name__ == "__main__":
    main()
