"""What the rewards compute. Each is a function of :class:`alignkit.Answers`, to a score an answer."""

from __future__ import annotations

import functools
import operator
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from alignkit import Answers, DataError, base, rankings, rewards
from alignkit.chat_template import pad_token

if TYPE_CHECKING:
    from alignkit.run import Run
    from alignkit_rewards import ClassifierConfig, EnsembleConfig, FunctionConfig, SumConfig

Scores = Callable[[Answers], Sequence[float]]


def classifier(config: ClassifierConfig, run: Any) -> Scores:
    """Any sequence-classification model: the answers' text, in its own chat template and its own tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    located = base.locate(str(config.model), run.say)
    model = AutoModelForSequenceClassification.from_pretrained(located, dtype=run.dtype).eval()
    model.to(run.device)
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


def ensemble(config: EnsembleConfig, run: Run) -> Scores:
    """The scores of several reward models, put together."""
    members = [run.reward_run(path) for path in config.paths]
    combine = functools.partial(COMBINE[config.by], config=config)

    def score(answers: Answers) -> list[float]:
        scores = [member(answers) for member in members]
        return [combine(of_one) for of_one in zip(*scores, strict=True)]

    return score


# "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743): mean, worst case, and a bound that is
# lower where the members disagree. The paper subtracts their variance; the deviation is in the unit of the scores.
COMBINE: dict[str, Callable[..., float]] = {
    "mean": lambda scores, config: statistics.fmean(scores),
    "min": lambda scores, config: min(scores),
    "mean-std": lambda scores, config: statistics.fmean(scores) - config.std_coef * statistics.pstdev(scores),
}


def weighted_sum(config: SumConfig, run: Run) -> Scores:
    """The parts' scores times their weights, added up; each part is checked under its own name."""
    weights = [float(table.get("weight", 1.0)) for table in config.parts]
    parts = [rewards.built(run.registry, table, run, own=("weight",)) for table in config.parts]

    def score(answers: Answers) -> list[float]:
        scores = [part(answers) for part in parts]
        return [sum(map(operator.mul, weights, of_one)) for of_one in zip(*scores, strict=True)]

    return score
