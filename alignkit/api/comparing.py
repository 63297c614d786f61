"""Comparing runs in Python. No torch here until a model is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignkit.api import libraries, limits, row_files
from alignkit.api.named import named
from alignkit.api.settings import Data, FilePath, PluginLike, RewardFunction, plugin_names
from alignkit.components import Judge
from alignkit.evaluation import between_runs, comparison
from alignkit.evaluation.comparison import Asked, Comparison
from alignkit.generation import scorers
from alignkit.judging import choosing
from alignkit.progress import progress
from alignkit.registry import Registry


def compare(
    runs: Sequence[FilePath],
    *,
    reward: FilePath | RewardFunction | Mapping[str, Any] | None = None,
    judge: FilePath | RewardFunction | Mapping[str, Any] | Judge | None = None,
    plugins: Iterable[PluginLike] = (),
    data: Data | None = None,
    limit: int = 100,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare runs with the first one on the same held-out prompts, as ``alignkit compare`` does.

    Args:
        runs: two or more runs of policies, or their folders.
        reward: what scores the answers: a reward run, the name of a reward, a table of its name and settings,
            ``"module:function"``, or a function of prompts and answers. Default without a judge: the newest known
            reward run.
        judge: what compares each run's answers with the first run's: the name of a judge, a table of its name and
            settings, an :class:`alignkit.Judge`, or what ``reward`` takes.
        plugins: plugins to activate.
        data: prompts: a path or a list of rows. Default: the held-out prompts of the runs.
        limit: the maximum number of prompts.
        max_new_tokens: the maximum tokens of an answer.
        temperature: of the answers and of their KL.
        batch: prompts per batch.
        seed: the same seed gives the same answers.

    Returns:
        What ``alignkit compare --json`` prints. ``result["runs"]`` has a dictionary for each run, with its ``score``,
        ``kl`` (nats per answer), ``length`` (tokens) and ``win_rate``, and standard errors as ``..._error``.

    Raises:
        AlignkitError: the runs cannot be compared, nothing scores their answers, or a number is out of its limits.
    """
    limits.check_whole(limit=limit, max_new_tokens=max_new_tokens, batch=batch)
    limits.check_number(0.01, temperature=temperature)
    limits.check_seed(seed)
    compared = comparison.runs_of([os.fspath(run) for run in runs])
    active, scorer, chosen = plugin_names(plugins), None, None
    if reward is not None:
        asked = named(reward, "reward")
        registry = Registry()
        registry.activate(*active, *asked.plugins)
        scorer = scorers.named(registry, "reward", asked.name, asked.overrides([*active, *asked.plugins], reward=True))
    if judge is not None:
        asked = named(judge, "judge")
        active = [*active, *asked.plugins]
        chosen = choosing.named("judge", asked.name, active, asked.overrides(active))
    if data is None:
        questions = comparison.prompts_of(None, compared, limit)
    else:
        with row_files.path_for(data) as path:
            questions = comparison.prompts_of(path, compared, limit)
        if not isinstance(data, str | os.PathLike):
            questions = questions._replace(source="rows in memory")
    for warning in questions.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    sampling = Asked(questions.prompts, max_new_tokens, batch, seed, temperature, questions.fields)
    of = between_runs.with_scorer(Comparison(compared, scorer, chosen, questions.source, sampling))
    with libraries.prepared():
        rows, judged = between_runs.compare(of, print, progress)
    return between_runs.as_json(of, rows, judged)
