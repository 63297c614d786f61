"""Rounds of feedback, as in InstructGPT: people rank answers of the newest policy, which is then trained further.

A round ends with a policy that was trained on feedback: against a reward, or on comparisons. What starts from that
policy, or learns from its answers, belongs to the next round. A policy also belongs to the round of its reward model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alignkit.components import Stage
from alignkit.rows import Prompt, Ranking


def uses_feedback(stage: Stage) -> bool:
    """Whether a stage trains against a reward or on comparisons."""
    return "reward" in stage.uses or Ranking in stage.rows


def after(record: Mapping[str, Any] | None) -> int:
    """The round that starts from a policy, whose manifest is ``record``; 1 for a model that was not trained here."""
    if record is None:
        return 1
    before = "policy" in record["parents"]  # without the two keys: only PPO and DPO started from a policy
    return int(record.get("round", 1)) + bool(record.get("feedback", before))


def of(stage: Stage, parents: Mapping[str, Mapping[str, Any]], sampled_from: Iterable[Mapping[str, Any]]) -> int:
    """The round of a run.

    ``parents`` are the manifests of the runs that it starts from, by role; ``sampled_from`` are the origins of the
    answers in its data, which do not count if the stage samples its own.
    """
    rounds = [after(record) if record["role"] == "policy" else record.get("round", 1) for record in parents.values()]
    if Prompt not in stage.rows:
        rounds += [origin["round"] for origin in sampled_from]
    return max([1, *rounds])
