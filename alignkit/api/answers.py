"""Sampling, ranking and scoring answers in Python. No torch here until a model is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignkit import paths
from alignkit.api import libraries, limits, row_files
from alignkit.api.named import named
from alignkit.api.settings import Data, FilePath, PluginLike, RewardFunction, plugin_names
from alignkit.generation import sample_files, score_rows
from alignkit.judging import OpenJudge, choosing, judge_answers, read_samples
from alignkit.judging.ranked_rows import notes, ranked_rows
from alignkit.progress import progress
from alignkit.runs import base, lineage


def sample(
    run: FilePath,
    prompts: Data,
    *,
    k: int = 4,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch: int = 16,
    seed: int = 0,
    output: FilePath | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sample ``k`` answers to each distinct prompt, as ``alignkit sample`` does.

    Args:
        run: a run, its folder, a model folder or a hub id.
        prompts: a path, or a list of prompts: strings, dictionaries with ``prompt``, or rows of alignkit.
        max_new_tokens: the maximum tokens of an answer.
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling: sample from the most likely tokens with this total probability.
        batch: prompts per batch.
        seed: the same seed gives the same answers.
        output: also write the rows to this file. An incomplete file is continued.
        model_kwargs: arguments of ``from_pretrained`` for a model that is not a run, such as ``revision``.

    Returns:
        A row for each distinct prompt: ``{"prompt": ..., "responses": [...], "sampled_from": {...}}``.

    Raises:
        AlignkitError: the model or the prompts cannot be used; ``output`` has other answers; a number is out of its
            limits.
    """
    limits.check_whole(k=k, max_new_tokens=max_new_tokens, batch=batch)
    limits.check_number(0, temperature=temperature)
    limits.check_number(0.01, 1, top_p=top_p)
    limits.check_seed(seed)
    settings = sample_files.Settings(max_new_tokens, temperature, top_p, seed)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(row_files.path_for(prompts))
        file = paths.expand(output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "samples.jsonl")
        kwargs = base.check_kwargs(os.fspath(run), model_kwargs or {})
        samples = sample_files.plan(os.fspath(run), path, file, k, batch, settings, kwargs)
        with libraries.prepared():
            sample_files.write(samples, progress)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def score(run: FilePath, rows: Data, *, batch: int = 16, format: str | None = None) -> list[dict[str, Any]]:
    """Score answers with a reward model, as ``alignkit score`` does.

    Args:
        run: the run of a reward model, or its folder.
        rows: a path, or a list of rows with a prompt and one or more answers.
        batch: answers per batch.
        format: the data format of the rows; None: detected.

    Returns:
        A row each: ``{"prompt": ..., "response": ..., "score": ...}``, or ``responses``, ``ranks`` and ``scores``.

    Raises:
        AlignkitError: the run is not a finished reward model; a row is bad.
    """
    limits.check_whole(batch=batch)
    parent = lineage.named("score", os.fspath(run), "reward")
    with row_files.path_for(rows) as path:
        answers = score_rows.read_answers(path, format)
        with libraries.prepared(), progress("scoring", None) as advance:
            return list(score_rows.scored(parent, answers, batch, advance))


def rank(
    samples: Data,
    by: FilePath | RewardFunction | Mapping[str, Any],
    *,
    plugins: Iterable[PluginLike] = (),
    batch: int = 16,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rank sampled answers by a judge or by score, as ``alignkit rank`` does.

    Args:
        samples: a path, or a list of rows with ``prompt`` and ``responses``, as :func:`sample` returns them.
        by: the name of a judge or a reward, a table of its name and settings (``{"name": "openai", "model": ...}``), a
            reward run, ``"module:function"``, or a function of prompts and answers (higher is better).
        plugins: plugins to activate.
        batch: answers per batch of a reward run.
        limit: the maximum number of requests to the judge.

    Returns:
        The rows with ``ranks``: 0 is best, equal ranks are a tie. Rows without a verdict on each pair are left out, and
        a line says how many.

    Raises:
        AlignkitError: the samples or the judge cannot be used.
    """
    limits.check_whole(batch=batch, limit=1 if limit is None else limit)
    asked = named(by, "by")
    active = [*plugin_names(plugins), *asked.plugins]
    with row_files.path_for(samples) as path:
        read = read_samples(paths.expand(path))
    chosen = choosing.named("by", asked.name, active, asked.overrides(active))
    items = [each.item for each in read]
    with libraries.prepared() if chosen.loads else contextlib.nullcontext():
        judge = OpenJudge(chosen, limit, batch)
        with progress("judging", sum(judge.way.requests(item.answers) for item in items)) as advance:
            outcomes = list(judge_answers(judge, items, advance))
    for note in notes(chosen, judge, outcomes):
        print(note)
    return ranked_rows(read, outcomes)
