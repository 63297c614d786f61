"""Answers of several policies to the same prompts. One model is in memory at a time; those on one base share it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignkit import bundled
from alignkit.batches import Answers, Sampling
from alignkit.config.model_kwargs import same_base
from alignkit.data.chat_template import prompt_ids
from alignkit.evaluation.checkpoints import Policy
from alignkit.evaluation.comparison import Asked
from alignkit.evaluation.paired import Answered
from alignkit.generation.chat import LoadedModel
from alignkit.generation.scorers import Scorer
from alignkit.runs import base


def answer(policies: Sequence[Policy], asked: Asked, advance: Callable[[int], None]) -> list[Answered]:
    """Each policy's answers, and their KL to the first one. ``advance`` is called with the number of answers."""
    import torch

    from alignkit.generation import text

    answers: dict[int, list[list[int]]] = {}
    own_logps: dict[int, list[float]] = {}  # under the policy itself
    for group in reversed(_sharing_a_base(policies)):  # the first one is last: it scores the answers of all others
        opened, adapters = _open([policies[number] for number in group])
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
        for number in range(len(policies))
    ]


def score(scorer: Scorer, asked: Asked, answered: Sequence[Answered], say: Callable[[str], None]) -> list[list[float]]:
    """The score of each answer of each run."""
    scores = scorer.open(asked.batch, say)
    return [scores(Answers(asked.prompts, run.texts, run.prompt_ids, run.answer_ids, asked.fields)) for run in answered]


def _sharing_a_base(policies: Sequence[Policy]) -> list[list[int]]:
    """The policies' numbers, grouped by base: adapters of the same base in the same form are one group."""
    groups: list[tuple[object, list[int]]] = []
    for number, policy in enumerate(policies):
        record = policy.record
        form: object = number
        if record["weights"] == "adapter":
            form = [record["base"]["located"], record["base"]["weights"], record["config"]["tuner"], record["dtype"]]
            form.append(same_base(record["config"].get("model_kwargs", {})))
        group = next((numbers for other, numbers in groups if other == form), None)
        if group is None:
            groups.append((form, [number]))
        else:
            group.append(number)
    return [numbers for _, numbers in groups]


def _open(policies: Sequence[Policy]) -> tuple[LoadedModel, list[str | None]]:
    """One model that holds all of these policies, and the adapter of each; None is the model without adapters."""
    from alignkit.data.chat_template import tokenizer_of_run
    from alignkit.models import adapters, device_and_dtype, run_device, trained_weights
    from alignkit.models.pretrained import load

    first = next((policy for policy in policies if not policy.is_base), policies[0])
    record = first.record
    names: list[str | None] = []
    if first.is_base:
        name = record["base"]["name"]
        located = base.locate(name, print) if name.startswith(bundled.PREFIX) else record["base"]["located"]
        kwargs = {"dtype": device_and_dtype.run_dtype({}), **base.kwargs_to_open(located, record)}
        model: Any = load(located, device_and_dtype.usable(kwargs, print)).eval()
    else:
        model = adapters.open_run(first.folder, record)
    for number, policy in enumerate(policies):
        adapter = None
        if hasattr(model, "peft_config") and not policy.is_base:
            adapter = "default" if policy is first else f"policy_{number}"
            if policy is not first:
                adapters.load_adapter(model, policy.folder, adapter, trained=False)
        if policy.checkpoint and policy.folder != policy.checkpoint:
            trained_weights.load_policy(model, adapter, policy.checkpoint)
        names.append(adapter)
    model.to(run_device({})).eval()
    return LoadedModel(model, tokenizer_of_run(first.run.folder, record), record["stop_ids"]), names


def _sample(
    opened: LoadedModel, adapter: str | None, asked: Asked, advance: Callable[[int], None]
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


def _logps(opened: LoadedModel, adapter: str | None, asked: Asked, answers: Sequence[list[int]]) -> list[float]:
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
