"""Which rows are held out."""

from __future__ import annotations

import random

import pytest

from alignkit import DataError, Demonstration
from alignkit.data.held_out import hold_out
from alignkit.rows import Located


def demonstrations(prompts: int, answers: int = 1) -> list[Located]:
    """Rows that ask every prompt ``answers`` times; those of one prompt are far apart."""
    return [Located(f"row {a} {p}", demonstration(p, a)) for a in range(answers) for p in range(prompts)]


def demonstration(prompt: int, answer: int) -> Demonstration:
    return Demonstration([{"role": "user", "content": f"{prompt}"}, {"role": "assistant", "content": f"{answer}"}])


def test_split_is_decided_by_the_seed() -> None:
    rows = demonstrations(50)
    assert hold_out(rows, 10, seed=1) == hold_out(rows, 10, seed=1)
    assert hold_out(rows, 10, seed=1) != hold_out(rows, 10, seed=2)


def test_rows_with_one_prompt_stay_together_and_none_is_lost() -> None:
    rows = demonstrations(20, answers=3)
    train, held = hold_out(rows, 0.25, seed=0)
    assert sorted(train + held, key=rows.index) == rows
    assert {r.row.key for r in train}.isdisjoint(r.row.key for r in held)
    assert len(held) == 15


@pytest.mark.parametrize(
    ("rows", "size", "held"), [(50, 0.2, 10), (50, 7, 7), (50, 1, 1), (50, None, 5), (3000, None, 200), (50, 0, 0)]
)
def test_size_is_a_share_or_a_count(rows: int, size: float | None, held: int) -> None:
    train, out = hold_out(demonstrations(rows), size, seed=0)
    assert (len(train), len(out)) == (rows - held, held)


@pytest.mark.parametrize(("prompts", "answers", "size"), [(5, 1, 5), (1, 9, 0.3), (1, 9, None)])
def test_holding_out_everything_is_an_error(prompts: int, answers: int, size: float | None) -> None:
    rows = demonstrations(prompts, answers)
    with pytest.raises(DataError, match=rf"of {len(rows)} rows leaves none to train on"):
        hold_out(rows, size, seed=0)


def dominated(frequent: int, others: int) -> list[Located]:
    rows = [Located(f"row {a}", demonstration(0, a)) for a in range(frequent)]
    return rows + [Located(f"row {frequent + p}", demonstration(p, 0)) for p in range(1, others + 1)]


@pytest.mark.parametrize("seed", range(10))
def test_a_frequent_prompt_does_not_make_the_held_out_rows_twice_as_many(seed: int) -> None:
    train, held = hold_out(dominated(90, 10), None, seed)
    assert (len(train), len(held)) == (90, 10)  # not the 90 rows of one prompt

    assert len(hold_out(dominated(15, 85), None, seed)[1]) in range(10, 21)


def test_a_split_that_was_near_enough_is_what_it_was() -> None:
    """Runs that were made before are resumed and compared with the rows that they held out."""
    rows = demonstrations(20, answers=3)
    keys = [row.row.key for row in rows[:20]]
    random.Random(0).shuffle(keys)
    assert {row.row.key for row in hold_out(rows, 10, seed=0)[1]} == set(keys[:4])  # 12 rows


def test_no_prompt_that_is_rare_enough_is_an_error_that_says_what_to_set() -> None:
    rows = demonstrations(2, answers=51)
    with pytest.raises(
        DataError, match=r"10 of 102 rows cannot be held out.* fewer than 51\. Set data.eval_size=26 or"
    ):
        hold_out(rows, None, seed=0)
    assert len(hold_out(rows, 26, seed=0)[1]) == 51


def test_rows_made_of_one_raw_row_stay_together() -> None:
    rows = [Located(f"row {p // 4}", demonstration(p, 0)) for p in range(80)]
    train, held = hold_out(rows, 0.25, seed=0)
    assert len(held) == 20
    assert {at for at, _ in train}.isdisjoint(at for at, _ in held)
