"""What the rewards compute. Each is a function of :class:`alignkit.Answers`, to a score an answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from alignkit import Answers, ConfigError, base, rankings
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
    if config.model is None:
        raise ConfigError("reward 'classifier' needs reward.model: a sequence-classification model")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    located = base.locate(config.model, run.say)
    model = AutoModelForSequenceClassification.from_pretrained(located, dtype=run.dtype).eval()
    model.to("cuda" if torch.cuda.is_available() and not run.config.train.get("use_cpu") else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(located)

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
            inputs = tokenizer(part, return_tensors="pt", padding=True, truncation=True, add_special_tokens=special)
            with torch.no_grad():
                found += model(**inputs.to(model.device)).logits[:, config.label].float().tolist()
        return found

    return score


def function(config: FunctionConfig) -> Scores:
    """``module:function`` on the prompts' and the answers' texts."""
    if config.call is None:
        raise ConfigError("reward 'function' needs reward.call=module:function")
    call = rankings.function(config.call)
    return lambda answers: call([rankings.prompt_text(prompt) for prompt in answers.prompts], answers.texts)


def weighted_sum(config: SumConfig, run: Any) -> Scores:
    """The parts' scores times their weights, added up; each part is checked under its own name."""
    if not config.parts:
        raise ConfigError("reward 'sum' needs reward.parts: a list of tables with name and weight")
    parts: list[tuple[str, float, Scores]] = []
    for table in config.parts:
        own = {key: value for key, value in table.items() if key != "weight"}
        if "name" not in own:
            raise ConfigError("reward.parts: a part has no name")
        component, settings = select(run.registry, "reward", own["name"], [own])
        parts.append((component.name, float(table.get("weight", 1.0)), component.build(settings, run)))

    def score(answers: Answers) -> list[float]:
        total = [0.0] * len(answers.texts)
        for name, weight, part in parts:
            scores = rankings.checked(f"reward '{name}'", functools.partial(part, answers), answers.texts)
            total = [so_far + weight * one for so_far, one in zip(total, scores, strict=True)]
        return total

    return score
