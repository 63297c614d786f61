"""The runs of ``frontier.py``: what they start from, how each side trains, and how every policy is evaluated.

A training run writes its policy as a PEFT adapter several times. All adapters, TRL's too, are evaluated by
:func:`evaluate`: answers to the held-out openings at temperature 1, their reward, and their log-probability under the
policy minus that under the model that all runs start from.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from alignkit import Sampling, hookimpl
from alignkit.data import load_tokenizer, prompt_ids
from alignkit.generation import locate_policy, open_model, sample, text
from alignkit.models import Member, Roles, run_dtype
from alignkit.runs import locate_model

SENTIMENT = Path(__file__).parents[1] / "examples" / "sentiment"
HELD_OUT = 5  # every fifth opening is held out
BATCH = 64  # answers that are sampled and scored at a time
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAIN = {"learning_rate": 5e-4, "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, "report_to": "none"}
ONLINE = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": BATCH}
OFFLINE = {"save_steps": 0.25, "eval_strategy": "no", "eval_on_start": False}

sys.path.insert(0, str(SENTIMENT))  # alignkit imports the reward by name
score = runpy.run_path(str(SENTIMENT / "sentiment.py"))["score"]


@dataclass(frozen=True)
class Method:
    """A way to train a policy: a stage of alignkit, or TRL's PPO."""

    stage: str | None  # None: TRL
    table: dict[str, Any] = field(default_factory=dict)  # the stage's settings
    train: dict[str, Any] = field(default_factory=dict)  # settings of its Trainer
    more: dict[str, Any] = field(default_factory=dict)  # other settings of the run
    online: bool = True  # samples its own answers; otherwise it learns from the rankings
    begins: float = 0.0  # the share of its steps after which the policy moves


# --- what all runs start from ----------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    """Write the openings, the model that all runs start from, and a ranking of its answers to each opening."""
    from alignkit.cli import main

    openings = (SENTIMENT / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (options.folder / "held-out.jsonl").write_text("".join(openings[::HELD_OUT]), encoding="utf-8")
    training = "".join(line for number, line in enumerate(openings) if number % HELD_OUT)
    (options.folder / "prompts.jsonl").write_text(training, encoding="utf-8")

    start = options.folder / "start"
    save_start(options.model, start)

    prompts, samples, rankings = (str(options.folder / f"{name}.jsonl") for name in ("prompts", "samples", "rankings"))
    answers = ["-k", str(options.answers), "--max-new-tokens", str(options.response_length)]
    for command in (
        ["sample", str(start), prompts, "--output", samples, *answers],
        ["rank", samples, "--by", "sentiment:score", "--output", rankings],
    ):
        if main(command):
            sys.exit(f"alignkit {' '.join(command)} failed")


def save_start(model: str, folder: Path) -> None:
    """Save the model with a chat template that adds nothing to an opening."""
    located = locate_model(model, print)
    transformers.AutoModelForCausalLM.from_pretrained(located, dtype="auto").save_pretrained(folder)
    load_tokenizer(located, str(SENTIMENT / "continue.jinja")).save_pretrained(folder)


def openings(file: Path, tokenizer: Any) -> list[list[int]]:
    """The token ids of the prompts in a file."""
    prompts = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


# --- training --------------------------------------------------------------------------------------------------------


class Snapshots(transformers.TrainerCallback):
    """Writes the policy as ``policy-1``, ``policy-2``, ...; a callback of either trainer, and a plugin of alignkit."""

    def __init__(self) -> None:
        self.folder, self.shares = Path(), list[float]()  # of the steps of the run

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[transformers.TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for number, share in enumerate(self.shares, 1):
            if state.global_step == math.ceil(share * state.max_steps):
                save_policy(model, self.folder / f"policy-{number}")


snapshots = Snapshots()


def save_policy(model: Any, folder: Path) -> None:
    """Write the policy's adapter: of the roles of an online stage, of TRL's policy and value, or of a PEFT model."""
    if isinstance(model, Roles):
        model.save_policy(folder)
    else:
        getattr(model, "policy", model).save_pretrained(str(folder))


def train(method: Method, options: argparse.Namespace, folder: Path, seed: int) -> None:
    """Train a run; an unfinished run of alignkit continues from its last checkpoint."""
    numbers, left = range(1, options.points + 1), 1 - method.begins
    # what learns from given answers moves fast at first
    shares = [n / options.points if method.online else 2.0 ** (n - options.points) for n in numbers]
    snapshots.folder, snapshots.shares = folder, [method.begins + share * left for share in shares]
    if method.stage is None:
        train_trl(method, options, folder, seed)
    else:
        from alignkit.training import execute

        for plan in plans(method, options, folder, seed):
            execute(plan, resume=True, overwrite=False, say=print)


def plans(method: Method, options: argparse.Namespace, folder: Path, seed: int) -> list[Any]:
    """The plan of a run of alignkit; none if it is finished."""
    from alignkit.registry import Plugin, Registry, installed
    from alignkit.runs import pipeline

    entry_point = EntryPoint("snapshots", f"{__name__}:snapshots", "-")
    registry = Registry([*installed(), Plugin("snapshots", "benchmarks", "0", entry_point)])
    data, table, train, reward = "rankings.jsonl", method.table, OFFLINE, {}
    if method.online:
        data, table, train = "prompts.jsonl", online_table(options) | method.table, ONLINE
        reward = {"reward": {"name": "function", "call": "sentiment:score"}}
    settings = {
        "plugins": [method.stage, "lora", "snapshots"],
        "model": str(options.folder / "start"),
        "output": str(folder),
        "tuner": LORA,
        "data": {"path": str(options.folder / data), "eval_size": 0},
        "stages": {method.stage: {"policy": "base", **table}},
        "train": {**TRAIN, **train, "seed": seed, "save_total_limit": 1, **method.train},
        **reward,
        **method.more,
    }
    return list(pipeline(registry, {}, settings, resume=True).to_train)


def online_table(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "iterations": options.iterations,
        "batch_size": options.batch_size,
        "response_length": options.response_length,
        "kl_coef": options.kl_coef,
        "missing_eos_penalty": 0,
        "save_every": max(1, options.iterations // 4),
    }


class RewardText(torch.nn.Module):
    """The reward function as TRL's PPO calls a reward model: a trunk, and a head on its last hidden states.

    The "hidden state" of every position is the score of the answer, [B, T, 1].
    """

    base_model_prefix = "trunk"

    def __init__(self, tokenizer: Any, prompts: Sequence[list[int]]) -> None:
        super().__init__()
        self.tokenizer, self.prompts = tokenizer, set(map(tuple, prompts))

    def trunk(self, input_ids: Any, attention_mask: Any, **kwargs: Any) -> SimpleNamespace:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [text(self.tokenizer, self.answer(row)) for row in rows]
        scores = torch.tensor(score([], answers), device=input_ids.device)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])

    def answer(self, ids: list[int]) -> list[int]:
        """The tokens after the prompt."""
        (length,) = [n for n in range(len(ids)) if tuple(ids[:n]) in self.prompts]
        return ids[length:]

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Head(torch.nn.Linear):
    """A scalar head in fp32 on hidden states of any dtype, which predicts 0 at first."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.float())


def train_trl(method: Method, options: argparse.Namespace, folder: Path, seed: int) -> None:
    """TRL's PPO with the settings of ours. Its value model is a LoRA too: it has the policy's learning rate."""
    import datasets
    import peft
    from trl.experimental import ppo

    start, dtype = options.folder / "start", run_dtype({})
    tokenizer = load_tokenizer(str(start), None)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token == tokenizer.eos_token:  # TRL would drop the end of an answer
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    prompts = openings(options.folder / "prompts.jsonl", tokenizer)
    rows = datasets.Dataset.from_dict({"input_ids": prompts})

    transformers.set_seed(seed)
    value = transformers.AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=dtype)
    value.score = Head(value.config.hidden_size, 1, bias=True)
    torch.nn.init.zeros_(value.score.weight)
    torch.nn.init.zeros_(value.score.bias)
    value.config.pad_token_id = tokenizer.pad_token_id
    ppo.PPOTrainer(
        args=ppo.PPOConfig(
            output_dir=str(folder / "trl"),
            total_episodes=options.iterations * options.batch_size,
            per_device_train_batch_size=options.batch_size,  # with less, minibatches would not be optimizer steps
            gradient_accumulation_steps=1,
            num_mini_batches=method.table["minibatches"],
            num_ppo_epochs=method.table["epochs"],
            response_length=options.response_length,
            stop_token="eos",
            temperature=1.0,
            kl_coef=options.kl_coef,
            lam=method.table["lam"],
            num_sample_generations=0,
            bf16=False,  # it would have no effect: the models are in bf16 already
            gradient_checkpointing=False,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            seed=seed,
            **{**TRAIN, **method.train},
        ),
        processing_class=tokenizer,
        model=transformers.AutoModelForCausalLM.from_pretrained(start, dtype=dtype),
        ref_model=None,
        reward_model=RewardText(tokenizer, prompts),
        value_model=peft.get_peft_model(value, peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA)),
        train_dataset=rows,
        eval_dataset=rows.select([0]),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[snapshots],
    ).train()


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace, adapter: Path | None, seed: int, file: Path) -> None:
    """Answer the held-out openings and write a line for each answer: prompt, answer, reward and KL in nats.

    ``adapter`` is that of a policy; None is the model that all runs start from.
    """
    opened = open_model(locate_policy(str(options.folder / "start")))
    model, policy = opened.model, None
    if adapter is not None:
        import peft

        model, policy = peft.PeftModel.from_pretrained(model, str(adapter)).eval(), "default"
    roles = Roles({"policy": Member(model, policy), "reference": Member(model)}, temperature=1.0)
    roles.shared_mask = model.dtype  # an opening is computed once for its answers
    sampling = Sampling(options.response_length, 1.0, tuple(opened.stop_ids), samples=options.samples)
    prompts, lines = openings(options.folder / "held-out.jsonl", opened.tokenizer), list[dict[str, Any]]()
    for first in range(0, len(prompts), size := max(1, BATCH // options.samples)):
        part = prompts[first : first + size]
        transformers.set_seed(seed * 1000 + first)  # the same random numbers for all methods
        sampled = sample(model, opened.tokenizer, part, sampling)
        asked = [prompt for prompt in part for _ in range(options.samples)]
        texts = [text(opened.tokenizer, answer) for answer in sampled]
        kl = log_ratios(roles, asked, sampled, opened.tokenizer.pad_token_id)
        columns = {
            "prompt": [opened.tokenizer.decode(prompt) for prompt in asked],
            "answer": texts,
            "score": score([], texts),
            "kl": kl,
            "prompt_ids": asked,
            "answer_ids": list(sampled),
        }
        lines += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(file)


@torch.no_grad()
def log_ratios(roles: Roles, prompts: list[list[int]], answers: list[list[int]], pad: int) -> list[float]:
    """The log-probability of each answer under the policy minus that under the reference, in nats at temperature 1."""
    outputs = roles(roles.sequences(prompts, answers, pad, roles.members["policy"].model.device), tuple(roles.members))
    ratios = outputs["policy"].logps.double() - outputs["reference"].logps.double()
    return ratios.sum(1).tolist()
