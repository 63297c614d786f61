"""The memory that ``alignkit plan`` computes, compared with the memory that the same runs take.

::

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --stages ppo --tuners full --length 128

Each run trains two optimizer steps, of two microbatches each, on rows of the same length. See ``memory_measured.py``
for what is measured. By default the model is the bundled one; on a CPU a run takes from half a minute to several.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory_measured import measure, planned

from alignkit import planning

STAGES = ("sft", "rm", "dpo", "ppo", "grpo", "kto", "rahf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES[:5])
    parser.add_argument("--tuners", nargs="+", default=["lora", "qlora", "full"])
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--words", type=int, default=100, help="of a prompt, and of an answer in the data")
    parser.add_argument("--response", type=int, default=64, help="tokens of an answer that a stage samples")
    parser.add_argument("--microbatch", type=int, default=4)
    parser.add_argument("overrides", nargs="*", help="settings as KEY=VALUE")
    options = parser.parse_args()
    print(f"{'MiB':<12}{'planned':>10}{'measured':>10}{'ratio':>8}")
    for stage in options.stages:
        for tuner in options.tuners:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                settings = settings_of(stage, tuner, options)
                plan, peak = planning.memory(planned(settings)), measure(settings)
            name, tensors = f"{stage} {tuner}", plan.tensors
            print(f"{name:<12}{tensors / 2**20:>10.0f}{peak / 2**20:>10.0f}{tensors / peak:>8.2f}", flush=True)


def settings_of(stage: str, tuner: str, options: Any) -> dict[str, Any]:
    """The settings of a run that starts from the base model, in the current folder."""
    prompt, answer = ("one " * options.words).strip(), ("two " * options.words).strip()
    good, bad = answer, answer.replace("two", "ten")
    rows: dict[str, dict[str, Any]] = {
        "sft": {"prompt": prompt, "response": answer},
        "rm": {"prompt": prompt, "chosen": good, "rejected": bad},
        "kto": {"prompt": prompt, "completion": answer, "label": True},
        "ppo": {"prompt": prompt},
    }
    kind = {"dpo": "rm", "rahf": "rm", "grpo": "ppo"}.get(stage, stage)
    number = 8 * options.microbatch
    lines = [{**rows[kind], **({"label": n % 2 == 0} if kind == "kto" else {})} for n in range(number)]
    for n, line in enumerate(lines):
        line["prompt"] = f"{n:03} {line['prompt']}"
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    Path("reward_by_length.py").write_text("def score(prompts, answers):\n    return [len(a) / 100 for a in answers]\n")
    table: dict[str, Any] = {"data": {"path": "rows.jsonl", "eval_size": 0}}
    train = {
        **{"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": options.microbatch},
        **{"per_device_eval_batch_size": options.microbatch, "use_cpu": not torch.cuda.is_available()},
    }
    if kind == "ppo":
        batch = {"batch_size": 4 * options.microbatch, "minibatches": 2, "response_length": options.response}
        table |= {**batch, "reward": {"name": "function", "call": "reward_by_length:score"}, "iterations": 1}
        table |= {"samples_per_prompt": 2} if stage == "grpo" else {}
    else:
        train["gradient_accumulation_steps"] = 2
    if stage != "sft":
        table["policy"] = "base"
    return {
        **{"plugins": [stage, tuner], "model": options.model, "output": "runs", "train": train},
        "stages": {stage: table},
    }


if __name__ == "__main__":
    main()
