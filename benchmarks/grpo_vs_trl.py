"""alignkit's GRPO beside TRL's ``GRPOTrainer``: the same model, prompts and settings; processes in turns.

::

    python benchmarks/grpo_vs_trl.py --runs 3
    OMP_NUM_THREADS=1 python benchmarks/grpo_vs_trl.py --runs 3 --clock cpu --even

Both sides start a LoRA policy from the same base, which is the reference, and score with the same reward model, which
``ppo_vs_trl.prepare`` trains for a step, as alignkit does it, and merges for TRL: an adapter of the policy's base here,
a second model there. The loss is the same: advantages within groups, a clipped ratio, and the KL in the loss. Both take
the same prompts in the same order, and as many optimizer steps an iteration. With ``--even`` no answer ends before it
has ``--response-length`` tokens.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import ppo_phases
import torch
import transformers
from ppo_vs_trl import compare, parse, parser, prepare, train_alignkit

from alignkit.data import load_tokenizer
from alignkit.runs import locate_model

SIDES = ("alignkit", "trl")

meter = ppo_phases.Meter()


def train_ours(options: argparse.Namespace) -> None:
    from alignkit.training import Run

    if options.even:
        Run.stop_ids = []  # type: ignore[assignment, misc]
    train_alignkit(options, meter, "grpo", {"kl": "loss", "kl_estimator": "k3-plain", "missing_eos_penalty": 0})


def train_trl(options: argparse.Namespace) -> None:
    import datasets
    import peft
    import trl

    located, dtype = locate_model(options.model, print), getattr(torch, options.dtype)
    tokenizer = load_tokenizer(located, None)
    tokenizer.padding_side = "left"
    meter.watch_trl_grpo(trl.GRPOTrainer)
    steps = options.epochs * options.minibatches
    trl.GRPOTrainer(
        args=trl.GRPOConfig(
            output_dir=str(options.folder / "trl"),
            max_steps=(options.iterations + 1) * steps,
            generation_batch_size=options.batch_size,
            num_generations=options.samples_per_prompt,
            num_iterations=options.epochs,
            per_device_train_batch_size=options.microbatch,
            gradient_accumulation_steps=options.batch_size // options.minibatches // options.microbatch,
            max_completion_length=options.response_length,
            generation_kwargs={"min_new_tokens": options.response_length} if options.even else None,
            temperature=1.0,
            beta=0.05,
            shuffle_dataset=False,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=options.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        processing_class=tokenizer,
        model=transformers.AutoModelForCausalLM.from_pretrained(located, dtype=dtype),
        reward_funcs=transformers.AutoModelForSequenceClassification.from_pretrained(
            options.folder / "reward", dtype=dtype
        ),
        reward_processing_classes=tokenizer,
        train_dataset=datasets.Dataset.from_list(prompts(options)),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[meter],
    ).train()


def prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts as conversations, in the order in which alignkit takes them."""
    rows = (options.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    contents = [json.loads(row)["prompt"] for row in rows]
    order = torch.randperm(len(contents), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return [{"prompt": [{"role": "user", "content": contents[index]}]} for index in order]


def child(options: argparse.Namespace) -> None:
    """Train one side in this process, and leave what was measured in a file."""
    meter.cpu_clock, meter.timed = options.clock == "cpu", options.iterations
    {"prepare": prepare, "alignkit": train_ours, "trl": train_trl}[options.side](options)
    if options.side != "prepare":
        numbers = meter.numbers(options.batch_size, getattr(torch, options.dtype))
        options.result.write_text(json.dumps(numbers), encoding="utf-8")


def main() -> None:
    own = parser(__doc__, SIDES, samples=8)
    own.add_argument("--even", action="store_true", help="all answers have --response-length tokens")
    own.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parse(own)
    if options.side:
        return child(options)
    compare(options, options.sides, lambda options, side: {"HF_DATASETS_CACHE": str(options.folder / "datasets")})


if __name__ == "__main__":
    main()
