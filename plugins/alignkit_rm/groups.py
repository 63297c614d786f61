"""Merges pairs that share a prompt into rankings, so that each answer is forwarded once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from alignkit import Located, Ranking, Run
from alignkit.data import EncodedRanking, Mapped, Ranked, encoded_rankings, ids_key, usable_rankings


def merge_pairs(rows: Iterable[Ranking]) -> list[Ranking]:
    """Merge the pairs of each prompt into rankings that imply the same comparisons, and no others.

    In a ranking, two answers are tied exactly if no chain of pairs compares them. ``a > b`` and ``a > c`` are such a
    ranking: ``b`` and ``c`` are tied. ``a > b`` and ``c > d`` are not, since ranks would also compare ``a`` with ``d``;
    they stay apart, as do pairs that contradict each other and pairs with margins. A comparison that occurs n times, as
    of n labelers, is in n rankings.
    """
    groups: dict[Hashable, list[Ranking]] = defaultdict(list)
    times: Counter[tuple[str, str, str]] = Counter()
    for number, row in enumerate(rows):
        if not _is_mergeable(row):
            groups[number].append(row)
            continue
        comparison = (prompt_of(row), *_better_first(row))
        groups[comparison[0], times[comparison]].append(row)
        times[comparison] += 1
    result = []
    for members in groups.values():
        result += _rankings_of(members) if _is_mergeable(members[0]) else members
    return result


def prompt_of(row: Ranking) -> str:
    """The identity of a prompt: its turns and tools. ``row.key`` may be the same for both."""
    return json.dumps([row.prompt, row.tools], sort_keys=True)


def _is_mergeable(row: Ranking) -> bool:
    """Whether a row is a pair of different answers and ranks, without margins."""
    return len(row.answers) == 2 == len(set(row.answers)) == len(set(row.ranks)) and row.margins is None


def _rankings_of(pairs: list[Ranking]) -> list[Ranking]:
    """The pairs of one prompt as rankings that imply the same comparisons.

    Connected pairs become one ranking if they are consistent with one. Otherwise each pair is added to the first
    ranking that it is consistent with.
    """
    consistent: list[list[tuple[str, str]]] = []
    for connected in _connected(list(map(_better_first, pairs))):
        if _depths(connected) is not None:
            consistent.append(connected)
            continue
        split: list[list[tuple[str, str]]] = []
        for pair in connected:
            fitting = next((others for others in split if _depths([*others, pair]) is not None), None)
            if fitting is None:
                split.append([pair])
            else:
                fitting.append(pair)
        consistent += split
    rankings = []
    for comparisons in consistent:
        depths = _depths(comparisons)
        assert depths is not None
        rankings.append(replace(pairs[0], answers=list(depths), ranks=[float(depth) for depth in depths.values()]))
    return rankings


def _better_first(pair: Ranking) -> tuple[str, str]:
    first, second = pair.answers
    return (first, second) if pair.ranks[0] < pair.ranks[1] else (second, first)


def _connected(pairs: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The pairs by connected component: pairs that share answers, directly or through other pairs."""
    groups: list[list[tuple[str, str]]] = []
    for pair in pairs:
        touching = [group for group in groups if any(set(pair) & set(other) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(other for group in touching for other in group), pair])
    return groups


def _depths(pairs: list[tuple[str, str]]) -> dict[str, int] | None:
    """The rank of each answer, the length of the longest chain above it; None if the pairs do not make a ranking.

    Pairs are (better, worse).
    """
    answers = list(dict.fromkeys(answer for pair in pairs for answer in pair))
    above: dict[str, set[str]] = {answer: {b for b, w in pairs if w == answer} for answer in answers}
    for _ in answers:  # transitive closure
        above = {answer: up.union(*(above[b] for b in up)) for answer, up in above.items()}
    if any(answer in up for answer, up in above.items()):
        return None  # the pairs contradict each other
    depths: dict[str, int] = {}
    for answer in sorted(answers, key=lambda answer: len(above[answer])):
        depths[answer] = max((depths[b] + 1 for b in above[answer]), default=0)
    implied = {(b, w) for w, up in above.items() for b in up}
    ranked = {(b, w) for b in answers for w in answers if depths[b] < depths[w]}
    return depths if implied == ranked else None


def encode_groups(run: Run, rows: Sequence[Located], max_length: int, too_long: str) -> Sequence[Ranked]:
    """Rankings as token ids, after :func:`merge_pairs`; otherwise as :func:`alignkit.data.encode_rankings`.

    Prompts and answers are the same if their tokens are: a chat template may trim what differs between two texts. Rows
    that a weight in ``data.path`` repeats are merged with each other, not with the rows that they repeat.
    """
    encoded = encoded_rankings(run, rows)
    first: dict[bytes, Ranking] = {}  # prompt tokens -> the first row with them
    texts: dict[tuple[bytes, bytes], str] = {}  # prompt and answer tokens -> the first text of both
    tokens: dict[tuple[str, str], tuple[int, int]] = {}  # a prompt, an answer's text -> a ranking and its answer
    where: dict[int, str] = {}  # id of a ranking -> its file and line
    by_copy: dict[int, list[Ranking]] = defaultdict(list)
    for number, (place, ranking) in enumerate(encoded):
        prompt = ids_key(ranking.prompt)
        row = first.setdefault(prompt, ranking.row)
        answers = []
        for index, (ids, text) in enumerate(zip(ranking.answers, ranking.row.answers, strict=True)):
            answers.append(texts.setdefault((prompt, ids_key(ids)), text))
            tokens[prompt_of(row), answers[-1]] = number, index
        rankings = by_copy[ranking.copy]
        rankings.append(replace(ranking.row, prompt=row.prompt, tools=row.tools, answers=answers))
        where[id(rankings[-1])] = place

    def merged(row: Ranking) -> tuple[str, EncodedRanking]:
        places = [tokens[prompt_of(row), text] for text in row.answers]
        sources = {number: encoded[number][1] for number, _ in places}
        answer_ids = [sources[number].answers[index] for number, index in places]
        prompt_ids = sources[places[0][0]].prompt
        return where.get(id(row), "pairs of one prompt"), EncodedRanking(row, prompt_ids, answer_ids)

    groups = [group for copy in sorted(by_copy) for group in merge_pairs(by_copy[copy])]
    return usable_rankings(run, Mapped(merged, groups), max_length, too_long)
