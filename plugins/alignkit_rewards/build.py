"""What the rewards compute. Each is a function of :class:`alignkit.Answers`, to a score an answer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from alignkit import Answers, DataError, base, rankings
from alignkit.chat_template import pad_token
from alignkit.config import select

if TYPE_CHECKING:
    from alignkit_rewards import ClassifierConfig, FunctionConfig, SumConfig

Scores = Callable[[Answers], Sequence[float]]


def rm(run: Any) -> Scores:
    """The role ``reward``: an adapter of the policy's trunk where it can be."""
    import torch

    from alignkit.trunk import Sequences

    size = run.config.train.get("per_device_eval_batch_size", 8)
    device = "cuda" if torch.cuda.is_available() and not run.config.train.get("use_cpu") else "cpu"

    def score(answers: Answers) -> list[float]:
        roles, found = run.roles.eval(), []
        for start in range(0, len(answers.texts), size):
            some = slice(start, start + size)
            sequences = Sequences.of(
                answers.prompt_ids[some], answers.answer_ids[some], run.tokenizer.pad_token_id, device
            )
            with torch.no_grad(), torch.autocast(device, run.dtype, enabled=run.dtype is not torch.float32):
                found += roles(sequences, ("reward",))["reward"].tolist()
        return found

    return score


def classifier(config: ClassifierConfig, run: Any) -> Scores:
    """Any sequence-classification model: the answers' text, in its own chat template and its own tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    located = base.locate(str(config.model), run.say)
    model = AutoModelForSequenceClassification.from_pretrained(located, dtype=run.dtype).eval()
    model.to("cuda" if torch.cuda.is_available() and not run.config.train.get("use_cpu") else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(located)
    if tokenizer.pad_token is None:  # a decoder's: the model looks for the last token that is no padding
        tokenizer.pad_token = pad_token(tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize)

    def text(prompt: Any, answer: str) -> str:
        if tokenizer.chat_template is None:
            return f"{rankings.prompt_text(prompt)}\n{answer}"
        turns = [*prompt, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    def score(answers: Answers) -> list[float]:
        texts = [text(*both) for both in zip(answers.prompts, answers.texts, strict=True)]
        found: list[float] = []
        special = tokenizer.chat_template is None
        for start in range(0, len(texts), config.batch):
            part = texts[start : start + config.batch]
            inputs = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=special)
            for one, tokens in zip(part, inputs["attention_mask"].sum(1).tolist(), strict=True):
                if tokens > longest:
                    raise DataError(f"reward 'classifier' reads {longest} tokens, and this has {tokens}: {one!r}")
            with torch.no_grad():
                found += model(**inputs.to(model.device)).logits[:, config.label].float().tolist()
        return found

    return score


def function(config: FunctionConfig) -> Scores:
    """``module:function`` on the prompts' and the answers' texts."""
    call = rankings.function(str(config.call))
    return lambda answers: call([rankings.prompt_text(prompt) for prompt in answers.prompts], answers.texts)


def weighted_sum(config: SumConfig, run: Any) -> Scores:
    """The parts' scores times their weights, added up; each part is checked under its own name."""
    parts: list[tuple[str, float, Scores]] = []
    for table in config.parts:
        own = {key: value for key, value in table.items() if key != "weight"}
        component, settings = select(run.registry, "reward", own["name"], [own])
        if component.check:
            component.check(settings)
        name = " ".join([component.name, *([own["call"]] if "call" in own else [])])
        parts.append((name, float(table.get("weight", 1.0)), component.build(settings, run)))

    def score(answers: Answers) -> list[float]:
        total = [0.0] * len(answers.texts)
        for name, weight, part in parts:
            scores = rankings.checked(f"reward '{name}'", functools.partial(part, answers), answers.texts)
            total = [so_far + weight * one for so_far, one in zip(total, scores, strict=True)]
        return total

    return score
