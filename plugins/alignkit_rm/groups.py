"""From rankings to groups: pairs that share a prompt are put together, so that each answer is forwarded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from alignkit import Ranking, Run
from alignkit.data import EncodedRanking, Located, Ranked, encode_each, ranking_encoder, usable_rankings


def merge_pairs(rows: Iterable[Ranking]) -> list[Ranking]:
    """Rankings whose answers are each there once: pairs of one prompt become one ranking where they make one.

    Pairs make a ranking when "not compared, directly or through others" is what ties are: then equal ranks say all that
    is known. ``a > b`` and ``a > c`` do; ``a > b`` and ``c > d`` do not and stay apart, as do pairs that contradict a
    ranking and pairs with margins.
    """
    merged: list[Ranking] = []
    pairs: dict[str, list[Ranking]] = defaultdict(list)
    for row in rows:
        if _stands_alone(row):
            merged.append(row)
        else:
            if row.key not in pairs:
                merged.append(row)  # keeps its place; replaced below
            pairs[row.key].append(row)
    result = []
    for row in merged:
        result += [row] if _stands_alone(row) else _rankings_of(pairs[row.key])
    return result


def _stands_alone(row: Ranking) -> bool:
    """Whether it is no pair that others may be put together with."""
    return len(row.answers) > 2 or row.margins is not None or len(set(row.ranks)) == 1 or len(set(row.answers)) == 1


def _rankings_of(pairs: list[Ranking]) -> list[Ranking]:
    """Pairs of one prompt as rankings, each of which says what its pairs say.

    Pairs that share answers, directly or through others, are one ranking where all of them together make one. Else each
    goes, in its turn, to the first ranking so far that can take it.
    """
    sets: list[list[tuple[str, str]]] = []
    for linked in _linked(list(map(_better_first, pairs))):
        if _depths(linked) is not None:
            sets.append(linked)
            continue
        apart: list[list[tuple[str, str]]] = []
        for pair in linked:
            fitting = next((known for known in apart if _depths([*known, pair]) is not None), None)
            if fitting is None:
                apart.append([pair])
            else:
                fitting.append(pair)
        sets += apart
    rankings = []
    for known in sets:
        depths = _depths(known)
        assert depths is not None
        rankings.append(replace(pairs[0], answers=list(depths), ranks=[float(depth) for depth in depths.values()]))
    return rankings


def _better_first(pair: Ranking) -> tuple[str, str]:
    first, second = pair.answers
    return (first, second) if pair.ranks[0] < pair.ranks[1] else (second, first)


def _linked(pairs: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The pairs, together where they share answers, directly or through others."""
    groups: list[list[tuple[str, str]]] = []
    for pair in pairs:
        touching = [group for group in groups if any(set(pair) & set(other) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(one for group in touching for one in group), pair])
    return groups


def _depths(pairs: list[tuple[str, str]]) -> dict[str, int] | None:
    """The rank of each answer, by how many are in the longest chain above it; None where ranks would say too much."""
    answers = list(dict.fromkeys(answer for pair in pairs for answer in pair))
    above: dict[str, set[str]] = {answer: {b for b, w in pairs if w == answer} for answer in answers}
    for _ in answers:  # the transitive closure: one more link a round
        above = {answer: up.union(*(above[b] for b in up)) for answer, up in above.items()}
    if any(answer in up for answer, up in above.items()):
        return None  # a circle
    depths: dict[str, int] = {}
    for answer in sorted(answers, key=lambda answer: len(above[answer])):
        depths[answer] = max((depths[b] + 1 for b in above[answer]), default=0)
    told = {(b, w) for w, up in above.items() for b in up}
    ranked = {(b, w) for b in answers for w in answers if depths[b] < depths[w]}
    return depths if told == ranked else None


def encode_groups(run: Run, rows: list[Located], max_length: int, too_long: str) -> list[Ranked]:
    """Rankings as token ids, pairs that share a prompt put together; as :func:`alignkit.data.encode_rankings`.

    Which prompts and answers are the same is told by their tokens: a template may trim what differs in two texts.
    """
    encoded = encode_each(run, rows, ranking_encoder(run))
    first: dict[tuple[int, ...], Ranking] = {}  # row with these prompt tokens
    texts: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}  # of the first answer with these tokens
    tokens: dict[tuple[str, str], tuple[list[int], list[int]]] = {}  # of a prompt's key and an answer's text
    where: dict[int, str] = {}
    rankings = []
    for place, one in encoded:
        prompt = tuple(one.prompt)
        same = first.setdefault(prompt, one.row)
        answers = []
        for ids, text in zip(one.answers, one.row.answers, strict=True):
            answers.append(texts.setdefault((prompt, tuple(ids)), text))
            tokens[same.key, answers[-1]] = (one.prompt, ids)
        rankings.append(replace(one.row, prompt=same.prompt, tools=same.tools, answers=answers))
        where[id(rankings[-1])] = place
    merged = []
    for ranking in merge_pairs(rankings):
        both = [tokens[ranking.key, text] for text in ranking.answers]
        again = EncodedRanking(ranking, both[0][0], [answer for _, answer in both])
        merged.append((where.get(id(ranking), "pairs of one prompt"), again))
    return usable_rankings(run, merged, max_length, too_long)
