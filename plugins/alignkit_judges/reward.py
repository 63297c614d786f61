"""The reward ``judge``: a judge compares answers to a prompt, and the score is the share of comparisons won.

Several samples to a prompt are compared with each other: their mean score is always 0.5. A single answer, such as that
to a held-out prompt, is compared with the answers to its prompt in a file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

from alignkit import Answers, ConfigError, Conversation, DataError, Plan, Run
from alignkit.data import prompt_of
from alignkit.judging import Item, OpenJudge, judge_answers, judge_of_table, read_samples
from alignkit_judges.config import RewardConfig


def check(config: RewardConfig, plan: Plan | None) -> None:
    """Check that there is something to compare each answer with.

    Raises:
        ConfigError: there is not, or the judge cannot be used.
    """
    if plan is None:
        raise ConfigError("reward 'judge' works only in training. To rank answers, name the judge: --by NAME")
    judge_of_table(plan.registry, config.judge)
    stage, samples = plan.config.stage.component.name, samples_of(plan)
    if config.baseline is None:
        if samples == 1:
            raise ConfigError(
                "reward 'judge' compares the answers to a prompt with each other, but each prompt has one answer. Set "
                f"{stage}.samples_per_prompt to 2 or more, or reward.baseline=FILE (alignkit sample writes it)"
            )
        if plan.eval_rows:
            raise ConfigError(
                "reward 'judge' compares the answer to a held-out prompt with one in a file. Set "
                "reward.baseline=FILE (alignkit sample writes it), or data.eval_size=0"
            )
        return
    answers = read_baseline(config.baseline)
    for rows in (plan.eval_rows, plan.train_rows if samples == 1 else []):
        prompts = [prompt_of(row) for _, row in rows]  # type: ignore[arg-type]
        if missing := [prompt for prompt in prompts if key(prompt) not in answers]:
            raise ConfigError(
                f"reward.baseline: {config.baseline} has no answer to {len(missing)} of {len(prompts)} prompts. The "
                f"first: {missing[0][-1]['content']!r}"
            )


def samples_of(run: Plan | Run) -> int:
    """The number of answers to each prompt in training."""
    return int(getattr(run.config.stage.config, "samples_per_prompt", 1))


def key(prompt: Conversation) -> str:
    """A prompt as a key: its roles and texts."""
    return json.dumps([[turn["role"], turn["content"]] for turn in prompt])


def read_baseline(file: str) -> dict[str, list[str]]:
    """The answers of a file of samples, by prompt. Rows with the same prompt add up."""
    try:
        samples = read_samples(Path(file).expanduser())
    except DataError as error:
        raise ConfigError(f"reward.baseline: {error}") from None
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(key(sample.item.prompt), []).extend(sample.item.answers)
    return answers


def win_rate(config: RewardConfig, run: Run) -> Callable[[Answers], list[float]]:
    """The function that scores answers by the share of comparisons that each wins; a tie is half, no verdict is NaN."""
    chosen = judge_of_table(run.registry, config.judge)
    judge = OpenJudge(chosen, say=run.say, train=run.config.train)
    baseline = read_baseline(config.baseline) if config.baseline else {}
    among_samples, warned = samples_of(run) > 1, False

    def score(answers: Answers) -> list[float]:
        nonlocal warned
        numbers = range(len(answers.texts))
        prompt_of_number = answers.prompts.__getitem__ if among_samples else None  # samples are next to each other
        groups = [list(group) for _, group in itertools.groupby(numbers, prompt_of_number)]
        compared = [(group, item) for group in groups for item in comparisons(answers.take(group), baseline)]
        wins: list[list[float]] = [[] for _ in answers.texts]
        outcomes = judge_answers(judge, [item for _, item in compared])
        for (group, _), outcome in zip(compared, outcomes, strict=True):
            for place, number in enumerate(group):
                if outcome is not None and (win := outcome.win_rate(place)) is not None:
                    wins[number].append(win)
        if not all(wins) and not warned:
            warned = True
            run.say(f"warning: judge '{chosen.name}' gave no verdict on an answer, whose score is therefore nan")
        return [sum(own) / len(own) if own else math.nan for own in wins]

    return score


def comparisons(answers: Answers, baseline: dict[str, list[str]]) -> list[Item]:
    """The comparisons that score the answers to one prompt: all of them, or a single one with each in the file."""
    prompt, texts = answers.prompts[0], answers.texts
    if len(texts) > 1:
        return [Item(prompt, texts)]
    return [Item(prompt, [*texts, other]) for other in baseline.get(key(prompt), [])]
