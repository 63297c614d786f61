"""Statistics on a judge from its verdicts: consistency, bias for position and length, and agreement with people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from alignkit.evaluation.error_bars import error_bar
from alignkit.judging import Item, Outcomes
from alignkit.labeling.agreement import cohen_kappa

Signs = tuple[int, int, str]  # of a pair of answers: two verdicts, each 1, 0 or -1, and its prompt
GROUPS = 100  # of prompts at most, for the jackknife
RELIABLE = 0.6  # the least share of pairs whose verdict stays the same when their answers are swapped


def judge_report(
    items: Sequence[Item], outcomes: Sequence[Outcomes], people: Sequence[Sequence[float | None] | None] = ()
) -> dict[str, Any]:
    """Metrics of a judge, each with its standard error over prompts as ``..._error`` if there are several.

    - ``consistency``: the share of pairs whose verdict stays the same when the answers are swapped.
    - ``first_place``: the share of verdicts other than ties that prefer the answer that the judge reads first.
    - ``length_correlation``: between winning and being the longer answer of a pair (Kendall's tau-b, -1 to 1).
    - ``kappa``: Cohen's kappa of the ranks and those of people, over the pairs of a prompt (better, tie, worse).

    A metric is None if no pair allows it: the first two if the judge is asked in one order, the last without people.

    Args:
        items: prompts with their answers.
        outcomes: of each item.
        people: ranks of the answers of each item by people; None for items and answers without.
    """
    swapped, first, lengths = list[tuple[float, str]](), list[tuple[float, str]](), list[Signs]()
    prompts = [json.dumps(item.prompt) for item in items]  # pairs of one prompt are not independent
    for prompt, item, outcome in zip(prompts, items, outcomes, strict=True):
        for pair in outcome.compared:
            if len(pair.verdicts) == 2:
                swapped.append((float(pair.verdicts[0] == pair.verdicts[1]), prompt))
                shown_first = [pair.verdicts[0], -pair.verdicts[1]]
                first += [(float(verdict > 0), prompt) for verdict in shown_first if verdict]
            longer = len(item.answers[pair.first]) - len(item.answers[pair.second])
            lengths.append((int(2 * pair.win - 1), _sign(longer), prompt))
    report: dict[str, Any] = {"pairs": len(lengths), **_share("consistency", swapped), **_share("first_place", first)}
    report |= _jackknifed("length_correlation", lengths, _tau)
    verdicts = list(_with_people(prompts, outcomes, people)) if people else []
    return report | _jackknifed("kappa", verdicts, _kappa)


def reliable(report: dict[str, Any]) -> bool:
    """Whether the judge keeps enough of its verdicts when answers are swapped."""
    return report["consistency"] is None or report["consistency"] >= RELIABLE


def describe_report(report: dict[str, Any]) -> list[str]:
    """The report as sentences. The last one is a warning if the judge is not reliable."""
    parts = [
        ("kept {} of its verdicts when the answers were swapped", "consistency", "{:.1%}"),
        ("preferred the first answer in {} of them", "first_place", "{:.1%}"),
        ("correlation of winning with length {}", "length_correlation", "{:.2f}"),
        ("Cohen's kappa with the ranks in the file {}", "kappa", "{:.2f}"),
    ]
    shown = [text.format(_shown(report, name, form)) for text, name, form in parts if report[name] is not None]
    lines = [f"{report['pairs']} pairs: {'; '.join(shown)}"] if shown else []
    if not reliable(report):
        lines.append(
            f"warning: this judge is not reliable: it kept fewer than {RELIABLE:.0%} of its verdicts when the answers "
            "were swapped"
        )
    return lines


def _shown(report: dict[str, Any], name: str, form: str) -> str:
    error = report[f"{name}_error"]
    return form.format(report[name]) + ("" if error is None else f" ± {form.format(error)}")


def _share(name: str, values: Sequence[tuple[float, str]]) -> dict[str, float | None]:
    """The mean of values, and its error, where values of one item are not independent."""
    if not values:
        return {name: None, f"{name}_error": None}
    numbers, groups = zip(*values, strict=True)
    return {name: sum(numbers) / len(numbers), f"{name}_error": None, **error_bar(f"{name}_error", numbers, groups)}


def _with_people(
    prompts: Sequence[str], outcomes: Sequence[Outcomes], people: Sequence[Sequence[float | None] | None]
) -> list[Signs]:
    """The judge's and people's verdict on each pair of answers that both have ranked."""
    found = []
    for prompt, outcome, ranks in zip(prompts, outcomes, people, strict=True):
        own = outcome.ranks
        ranked = [answer for answer, rank in enumerate(ranks or []) if rank is not None]
        for a in ranked:
            for b in ranked:
                if a < b:
                    assert ranks is not None
                    found.append((_sign(own[b] - own[a]), _sign((ranks[b] or 0) - (ranks[a] or 0)), prompt))
    return found


def _tau(pairs: Sequence[Signs]) -> float | None:
    """Kendall's tau-b of two signs: each pair of answers counts in both orders."""
    wins, longer = sum(win != 0 for win, _, _ in pairs), sum(length != 0 for _, length, _ in pairs)
    return sum(win * length for win, length, _ in pairs) / math.sqrt(wins * longer) if wins and longer else None


def _kappa(pairs: Sequence[Signs]) -> float | None:
    """Cohen's kappa of better, tie and worse. Each pair counts in both orders, since either answer could be first."""
    own, people = ([sign * pair[column] for sign in (1, -1) for pair in pairs] for column in (0, 1))
    kappa = cohen_kappa(own, people)
    return None if math.isnan(kappa) else kappa


def _jackknifed(
    name: str,
    pairs: Sequence[Signs],
    statistic: Callable[[Sequence[Signs]], float | None],
) -> dict[str, float | None]:
    """A statistic of pairs, and its standard error: a jackknife, which leaves out one group of prompts at a time."""
    value, prompts = statistic(pairs), sorted({prompt for _, _, prompt in pairs})
    report: dict[str, float | None] = {name: value, f"{name}_error": None}
    group = {prompt: number % GROUPS for number, prompt in enumerate(prompts)}
    groups = sorted(set(group.values())) if value is not None else []
    without = [statistic([pair for pair in pairs if group[pair[2]] != left_out]) for left_out in groups]
    defined = [each for each in without if each is not None]
    if len(defined) > 1:
        mean = sum(defined) / len(defined)
        variance = sum((each - mean) ** 2 for each in defined) * (len(defined) - 1) / len(defined)
        report[f"{name}_error"] = math.sqrt(variance)
    return report


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
