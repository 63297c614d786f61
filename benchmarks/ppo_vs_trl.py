"""alignkit's PPO beside the last ``PPOTrainer`` of TRL: the same model, prompts and settings; processes in turns.

::

    pip install --no-deps --target trl-1.12 'trl==1.12.*'
    python benchmarks/ppo_vs_trl.py --trl trl-1.12 --runs 3

TRL removed PPO in 1.13, so 1.12 is put beside the environment, in a folder of its own that only TRL's processes see.
Both sides start a LoRA policy from the same base, which is the reference, and score with the same reward model, which
:func:`prepare` trains for a step, as alignkit does it, and merges for TRL. The value model starts from it: an adapter
of the same trunk here (or a head on the policy, with ``--value head``), a whole model that is trained whole there, as
TRL's documentation does it; ``PPOTrainer`` takes a ``peft_config`` for the policy alone. TRL gets another pad token
than the end of sequence where the tokenizer has one, for it drops the latter where they are the same.

TRL takes one optimizer step an epoch whatever ``num_mini_batches``, alignkit takes as many as there are minibatches.

With ``--samples-per-prompt K`` alignkit samples K answers to each prompt, and TRL gets each prompt K times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pairs
import ppo_phases
import torch
import transformers

from alignkit import bundled
from alignkit.data import load_tokenizer, prompt_ids
from alignkit.models import run_dtype
from alignkit.runs import locate_model

SIDES = ("alignkit", "trl")


meter = ppo_phases.Meter()


def prepare(options: argparse.Namespace) -> None:
    """Prompts, a reward model, and the same for TRL: ids and a merged model."""
    from alignkit.models import open_run
    from alignkit.runs import read_manifest

    located = locate_model(options.model, print)
    tokenizer = load_tokenizer(located, None)
    iterations = options.iterations + 1  # FLOPs are counted in the last one
    prompts = make_prompts(tokenizer, iterations * options.batch_size // options.samples_per_prompt, options)
    write(options.folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    ids = [encode(tokenizer, prompt) for prompt in prompts for _ in range(options.samples_per_prompt)]
    write(options.folder / "ids.jsonl", [{"input_ids": one} for one in ids])

    rankings = bundled.data("bundled:rankings").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (options.folder / "rankings.jsonl").write_text("".join(rankings), encoding="utf-8")
    execute(
        options,
        "rm",
        {"policy": "base"},
        {"max_steps": 1, "per_device_train_batch_size": 1},
        str(options.folder / "rankings.jsonl"),
    )
    run = options.folder / "rm"
    merged: Any = open_run(run, read_manifest(run), torch.float32)
    merged = merged.merge_and_unload() if hasattr(merged, "merge_and_unload") else merged
    merged.save_pretrained(options.folder / "reward")


def make_prompts(tokenizer: Any, number: int, options: argparse.Namespace) -> list[str]:
    """Bundled prompts; one of fewer than ``--prompt-length`` tokens is preceded by the text of others."""
    lines = bundled.data("bundled:prompts").read_text(encoding="utf-8").splitlines()
    bundled_prompts = [json.loads(line)["prompt"] for line in lines]
    filler = itertools.cycle(tokenizer("\n\n".join(bundled_prompts), add_special_tokens=False)["input_ids"])
    prompts = []
    for prompt in itertools.islice(itertools.cycle(bundled_prompts), number):
        missing = max(0, options.prompt_length - len(encode(tokenizer, prompt)))
        before = tokenizer.decode(list(itertools.islice(filler, missing)))
        prompts.append(f"{before}\n\n{prompt}" if before else prompt)
    return prompts


def encode(tokenizer: Any, prompt: str) -> list[int]:
    return prompt_ids(tokenizer, [{"role": "user", "content": prompt}])


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def execute(
    options: argparse.Namespace, stage: str, table: dict[str, Any], train: dict[str, Any], data: str, **more: Any
) -> None:
    """One run of alignkit in this process."""
    from alignkit.registry import Plugin, Registry, installed
    from alignkit.runs import pipeline
    from alignkit.training import execute

    registry = Registry([*installed(), Plugin("meter", "benchmarks", "0", EntryPoint("meter", "__main__:meter", "-"))])
    settings = {
        "plugins": [stage, "lora", "meter"],
        "model": options.model,
        "output": str(options.folder),
        "data": {"path": data, "eval_size": 0},
        "train": {
            "bf16": options.dtype == "bfloat16",
            "use_cpu": not torch.accelerator.is_available(),
            "save_strategy": "no",
            "report_to": "none",
            **train,
        },
        "stages": {stage: table},
        **more,
    }
    (plan,) = pipeline(registry, {}, settings).to_train
    execute(plan, resume=False, overwrite=True, say=print)


def train_ours(options: argparse.Namespace) -> None:
    train_alignkit(options, meter, "ppo", {"value": options.value})


def train_alignkit(options: argparse.Namespace, meter: ppo_phases.Meter, stage: str, own: dict[str, Any]) -> None:
    """Train an online stage, with ``own`` settings beside those that are the same in all of these benchmarks."""
    rows = (options.folder / "ids.jsonl").read_text(encoding="utf-8").splitlines()
    table = {
        "policy": "base",
        "iterations": options.iterations + 1,
        "batch_size": options.batch_size,
        "samples_per_prompt": options.samples_per_prompt,
        "max_prompt_length": max(len(json.loads(row)["input_ids"]) for row in rows),
        "minibatches": options.minibatches,
        "epochs": options.epochs,
        "response_length": options.response_length,
        "kl_coef": 0.05,
        "temperature": 1.0,
        **own,
    }
    train = {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": options.microbatch,
        "gradient_checkpointing": False,
        "seed": options.seed,
    }
    reward = {"name": "reward-model", "path": str(options.folder / "rm")}
    meter.watch_alignkit()
    execute(options, stage, table, train, str(options.folder / "prompts.jsonl"), reward=reward)


def train_trl(options: argparse.Namespace) -> None:
    """As examples/scripts/ppo of TRL does it."""
    import datasets
    import peft
    from trl.experimental import ppo

    located, dtype = locate_model(options.model, print), getattr(torch, options.dtype)
    tokenizer = load_tokenizer(located, None)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    reward, value = (
        transformers.AutoModelForSequenceClassification.from_pretrained(options.folder / "reward", dtype=dtype)
        for _ in range(2)
    )
    meter.watch_trl(ppo.ppo_trainer)
    ppo.PPOTrainer(
        args=ppo.PPOConfig(
            output_dir=str(options.folder / "trl"),
            total_episodes=(options.iterations + 1) * options.batch_size,
            num_mini_batches=options.minibatches,
            num_ppo_epochs=options.epochs,
            response_length=options.response_length,
            stop_token="eos",
            missing_eos_penalty=1.0,
            temperature=1.0,
            kl_coef=0.05,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=options.microbatch,
            gradient_accumulation_steps=options.batch_size // options.microbatch,
            num_sample_generations=0,
            bf16=False,  # it would have no effect: the models are in bf16 already
            gradient_checkpointing=False,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        processing_class=tokenizer,
        model=transformers.AutoModelForCausalLM.from_pretrained(located, dtype=dtype),
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.load_dataset("json", data_files=str(options.folder / "ids.jsonl"), split="train"),
        eval_dataset=datasets.load_dataset("json", data_files=str(options.folder / "ids.jsonl"), split="train[:1]"),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[meter],
    ).train()


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    meter.cpu_clock, meter.timed = options.clock == "cpu", options.iterations
    {"prepare": prepare, "alignkit": train_ours, "trl": train_trl}[options.side](options)
    if options.side != "prepare":
        numbers = meter.numbers(options.batch_size, getattr(torch, options.dtype))
        options.result.write_text(json.dumps(numbers), encoding="utf-8")


def environment(options: argparse.Namespace, side: str) -> dict[str, str]:
    """TRL 1.12 is on the path of TRL's processes only."""
    own = {"HF_DATASETS_CACHE": str(options.folder / "datasets"), "TRL_EXPERIMENTAL_SILENCE": "1"}
    if side == "trl":
        own["PYTHONPATH"] = os.pathsep.join([str(options.trl.absolute()), os.environ.get("PYTHONPATH", "")])
    return own


def parser(description: str | None, sides: Sequence[str], samples: int) -> argparse.ArgumentParser:
    """The options that the benchmarks of online stages share; ``samples`` is their default of answers a prompt."""
    parser = pairs.parser(description, ("prepare", *sides), runs=2)
    parser.add_argument("--iterations", type=int, default=4, help="of each run, at least 2; the first is not timed")
    parser.add_argument("--batch-size", type=int, default=32, help="answers an iteration")
    parser.add_argument("--samples-per-prompt", type=int, default=samples, help="answers to each prompt")
    parser.add_argument("--prompt-length", type=int, default=0, help="minimum tokens of a prompt, roughly")
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1, help="passes over an iteration's answers")
    parser.add_argument("--microbatch", type=int, default=4, help="answers in a forward with gradients")
    parser.add_argument("--response-length", type=int, default=64)
    default = str(run_dtype({})).removeprefix("torch.")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=default, help="of the base, on both sides")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is shared")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.batch_size % options.samples_per_prompt or options.iterations < 2:
        parser.error("--batch-size must be a multiple of --samples-per-prompt, and --iterations at least 2")
    return options


def compare(
    options: argparse.Namespace, sides: Sequence[str], environment: Callable[[argparse.Namespace, str], dict[str, str]]
) -> None:
    """Measure all sides in turns, and print phases and ratios."""

    def measure(side: str, seed: int) -> pairs.Numbers:
        numbers = pairs.measure(
            side, "--folder", str(options.folder), "--seed", str(seed), **environment(options, side)
        )
        if numbers:
            printed = {name: numbers[name] for name in ("seconds", "tokens", "GFLOP", "share", "peak MiB")}
            print(pairs.line(side, printed), flush=True)
        return numbers

    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        measure("prepare", 0)
        measured = pairs.in_turns(sides, options.runs, measure)
    print("\nmedian of an iteration")
    print(ppo_phases.table(measured))
    if "trl" in sides:
        print("\nTRL / alignkit, of neighboring runs")
        phases = [f"{name} {phase}" for name in ("seconds", "GFLOP") for phase in ppo_phases.PHASES]
        for name in ("seconds", "GFLOP", *phases, "peak MiB"):
            print(pairs.spread(f"{name:<16}", pairs.ratios(measured["trl"], measured["alignkit"], name)))


def main() -> None:
    own = parser(__doc__, SIDES, samples=1)
    own.add_argument("--trl", type=Path, help="a folder with TRL 1.12; without it alignkit alone is measured")
    own.add_argument("--value", choices=("adapter", "head"), default="adapter", help="alignkit's ppo.value")
    options = parse(own)
    if options.side:
        return child(options)
    compare(options, SIDES if options.trl else SIDES[:1], environment)


if __name__ == "__main__":
    main()
