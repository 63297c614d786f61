"""Answers of several runs to the same prompts. One model is in memory at a time; runs on the same base share it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.batches import Answers, Sampling
from alignkit.data.chat_template import prompt_ids
from alignkit.evaluation.comparison import Answered
from alignkit.generation import chat
from alignkit.generation.scorers import Scorer
from alignkit.rows import Conversation
from alignkit.runs.lineage import Parent


@dataclass(frozen=True)
class Asked:
    """The prompts that every run answers, and how answers are sampled."""

    prompts: list[Conversation]
    max_new_tokens: int
    batch: int  # prompts per batch
    seed: int
    temperature: float = 1.0  # of sampling and of log-probabilities
    fields: list[Mapping[str, Any]] | None = None  # the other fields of the prompts' rows


def answer(runs: Sequence[Parent], asked: Asked, advance: Callable[[int], None]) -> list[Answered]:
    """Each run's answers, and their KL to the first run. ``advance`` is called with the number of prompts answered."""
    import torch

    from alignkit.generation import text

    answers: dict[int, list[list[int]]] = {}
    own_logps: dict[int, list[float]] = {}  # under the run itself
    for group in reversed(_sharing_a_base(runs)):  # the first run is last: it scores the answers of all others
        opened, adapters = _open([runs[number] for number in group])
        for number, adapter in zip(group, adapters, strict=True):
            answers[number] = list(_sample(opened, adapter, asked, advance))
            own_logps[number] = _logps(opened, adapter, asked, answers[number])
        if group[0] == 0:
            first_logps = {number: _logps(opened, adapters[0], asked, ids) for number, ids in answers.items()}
            tokenizer, stop_ids = opened.tokenizer, opened.stop_ids
        del opened
        gc.collect()
        torch.cuda.empty_cache()
    return [
        Answered(
            texts=[text(tokenizer, ids) for ids in answers[number]],
            lengths=[len(ids) for ids in answers[number]],
            ended=[ids[-1] in stop_ids for ids in answers[number]],
            kl=[own - first for own, first in zip(own_logps[number], first_logps[number], strict=True)],
            prompt_ids=[prompt_ids(tokenizer, prompt) for prompt in asked.prompts],
            answer_ids=answers[number],
        )
        for number in range(len(runs))
    ]


def score(scorer: Scorer, asked: Asked, answered: Sequence[Answered], say: Callable[[str], None]) -> list[list[float]]:
    """The score of each answer of each run."""
    scores = scorer.open(asked.batch, say)
    return [scores(Answers(asked.prompts, run.texts, run.prompt_ids, run.answer_ids, asked.fields)) for run in answered]


def _sharing_a_base(runs: Sequence[Parent]) -> list[list[int]]:
    """The runs' numbers, grouped by base: adapters of the same base in the same form are one group."""
    groups: list[tuple[object, list[int]]] = []
    for number, run in enumerate(runs):
        record = run.manifest
        assert record is not None
        form: object = number
        if record["weights"] == "adapter":
            form = [record["base"]["located"], record["base"]["weights"], record["config"]["tuner"], record["dtype"]]
        group = next((numbers for other, numbers in groups if other == form), None)
        if group is None:
            groups.append((form, [number]))
        else:
            group.append(number)
    return [numbers for _, numbers in groups]


def _open(runs: Sequence[Parent]) -> tuple[chat.LoadedModel, list[str | None]]:
    """One model that holds all of these runs, and the adapter of each."""
    from alignkit.models.adapters import load_adapter

    records = [run.manifest for run in runs]
    opened = chat.open_model(chat.ModelSource(str(runs[0].folder), records[0]))
    if not hasattr(opened.model, "peft_config"):
        return opened, [None]
    names = ["default", *(f"run_{number}" for number in range(1, len(runs)))]
    for name, run in zip(names[1:], runs[1:], strict=True):
        load_adapter(opened.model, run.folder, name, trained=False)
    opened.model.to(opened.model.device).eval()
    return opened, list(names)


def _sample(
    opened: chat.LoadedModel, adapter: str | None, asked: Asked, advance: Callable[[int], None]
) -> Iterator[list[int]]:
    import transformers

    from alignkit.generation import sample
    from alignkit.models import use_adapter

    sampling = Sampling(asked.max_new_tokens, temperature=asked.temperature, stop_ids=tuple(opened.stop_ids))
    for start in range(0, len(asked.prompts), asked.batch):
        part = asked.prompts[start : start + asked.batch]
        transformers.set_seed(asked.seed + start)  # the same random numbers for every run
        with use_adapter(opened.model, adapter):
            yield from sample(opened.model, opened.tokenizer, [prompt_ids(opened.tokenizer, p) for p in part], sampling)
        advance(len(part))


def _logps(opened: chat.LoadedModel, adapter: str | None, asked: Asked, answers: Sequence[list[int]]) -> list[float]:
    """The log-probability of each answer."""
    import torch

    from alignkit.models import Member, Roles, Sequences

    roles = Roles({"policy": Member(opened.model, adapter)}, asked.temperature)
    pad, logps = opened.tokenizer.pad_token_id, list[float]()
    prompts = [prompt_ids(opened.tokenizer, prompt) for prompt in asked.prompts]
    for start in range(0, len(prompts), asked.batch):
        part = slice(start, start + asked.batch)
        sequences = Sequences.of(prompts[part], answers[part], pad, opened.model.device)
        with torch.no_grad():
            logps += roles(sequences, ("policy",))["policy"].logps.double().sum(1).tolist()
    return logps
