"""Reward ``exact-answer``: what is a final answer, when it is right, and rows without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ppo_runs import SMALL, iterations

from alignkit import Answers, DataError
from alignkit.cli import main
from alignkit_rewards.exact_answer import is_right, score


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It is 7.", "7"),
        ("3 + 4 = 7, so 7 apples", "7"),
        ("That makes $1,234.50 in total.", "1234.5"),
        ("10-4=6", "6"),
        ("It falls to -3 degrees", "-3"),
        ("It falls to \N{MINUS SIGN}3 degrees", "-3"),
        ("a half is 1/2", "0.5"),
        ("So 9 of them. #### 18", "She sells 16 - 3 - 4 = 9 eggs. #### 18"),
        (r"First \boxed{3}, no: \boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{x^{2} + 1}", r"\boxed{x^2+1}"),
        (r"Thus $\boxed{\text{Paris}}$.", "Paris"),
        ("50%", "50"),
        ("007", "7"),
        ("1,234,567", "1234567"),
        ("the roots are 1,2", "2"),  # two numbers
        (r"\boxed{1, 2}", "1,2"),
        ("1.5e3", "1500"),
        ("#### 1,234 dollars", "1234"),  # a unit that the right answer has not
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{18 \text{ cm}^2}", "18"),
        ("#### 60 miles per hour", "60"),
        ("#### 4km", "4"),
        ("It takes 18 of them", "18 dollars"),  # and a unit that only the right answer has
        ("#### 18 dollar", "$18"),
        ("#### 5 hours", "5 hour."),
        ("He is at -$5.", "-5"),  # currency
        ("#### -$1,234.50", "#### $-1234.5"),
        ("#### €5", "5"),
        ("5 €", "5"),
        (r"\boxed{\$18}", "18"),
        ("#### 50 percent", "50%"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{90^{\circ}}", "90"),
        ("#### **18**.", "18"),
        ("#### .5", "0.50"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"),
        (r"So it is $\frac{3}{4}$.", "0.75"),
        ("It is 3 1/2 inches", "3.5"),  # mixed numbers
        (r"\boxed{3\frac{1}{2}}", "7/2"),
        ("#### -3 1/2", "-3.5"),
        ("#### 1 234", "1234"),
        (r"\boxed{1\,234}", "1234"),
        (r"So the result is $-\frac{1}{2}$.", "-1/2"),  # what is not marked is read in the same way
        (r"x=-\frac12", "-0.5"),
        (r"It is $\frac{1}{-2}$", "-1/2"),
        ("It is 12 345.", "12345"),
        (r"It is $12\,345$.", "12345"),
        (r"It is $12{,}345$.", "12345"),
        ("In 2020 100 people came", "100"),
    ],
)
def test_right_answers(text: str, right: str) -> None:
    assert is_right(text, right)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("7 or 8", "7"),  # the last number counts
        ("#### 7 and then 8", "8"),  # a mark counts more than a number
        (r"\boxed{7} #### 8", "8"),
        ("77", "7"),
        ("no number", "7"),
        ("", "0"),
        ("Paris", "Paris"),  # an expression has to be marked
        (r"\boxed{paris}", "Paris"),
        ("1/0", "1"),
        ("9" * 5000, "9"),
        (r"\boxed{12}", "1,2"),  # commas that do not group thousands
        (r"\boxed{1, 2}", "12"),
        ("the roots are 1,2", "12"),
        (r"\boxed{1e999999999}", "1"),  # neither slow nor out of memory
        (r"\boxed{5 hours}", "5 minutes"),
        (r"\boxed{5\pi}", "5"),
        (r"\boxed{3 apples and 4 pears}", "3"),
        ("It is 3 1/2 inches", "0.5"),
        ("#### 3 1/2", "15.5"),
        ("#### 3 4", "34"),
        (r"\frac{3}{4}", "4"),
        ("#### 5 minutes", "5 hours"),
        ("He is at -$5.", "5"),
        (r"So the result is $-\frac{1}{2}$.", "1/2"),
        (r"It is $\frac{1}{-2}$", "-2"),
        ("It is 12 345.", "345"),
        (r"It is $12\,345$.", "345"),
    ],
)
def test_wrong_answers(text: str, right: str) -> None:
    assert not is_right(text, right)


def test_a_number_as_answer_and_answers_without_rows() -> None:
    answers = Answers([[], []], ["7", "8"], [[], []], [[], []], fields=[{"answer": 7}, {"answer": 7.0}])

    assert score(answers) == [1, 0]
    assert score(answers.take([1, 0])) == [0, 1]
    for fields in (None, [{}], [{"answer": " "}]):  # such as an empty cell of a CSV file
        with pytest.raises(DataError, match="needs the field 'answer' of the prompts' rows"):
            score(Answers([[]], ["7"], [], [], fields))


EXACT = ["grpo.policy=base", "reward.name=exact-answer", "grpo.samples_per_prompt=2", "grpo.iterations=1"]


def words(command: str, *arguments: str) -> list[str]:
    return [command, "--plugin", "grpo", *(s.replace("ppo.", "grpo.", 1) for s in SMALL), *EXACT, *arguments]


def test_rows_keep_their_answer_for_the_reward(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a function, and in a sum; a missing answer is an error of ``check``, or a row that is skipped."""
    rows = [{"prompt": f"What is {n} and one?", "answer": str(n + 1), "level": n} for n in range(12)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("level.py").write_text("def level(prompts, answers, fields):\n    return [f['level'] for f in fields]\n")
    parts = "reward.parts=[{name: exact-answer}, {name: function, call: 'level:level'}]"
    assert main(words("train", "reward.name=sum", parts)) == 0
    assert 0 < iterations(Path("runs/grpo"))[0]["score"] <= 12
    shutil.copytree("runs/grpo", "again")
    compare = ["compare", "runs/grpo", "again", "--max-new-tokens", "4", "--output", "table.jsonl"]
    assert main([*compare, "--reward", "exact-answer"]) == 0
    assert main([*compare, "--reward", "level:level", "--data", "prompts.jsonl"]) == 0
    (table,) = [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()][:1]
    assert table["score"] == 5.5  # the mean of 0 to 11

    del rows[3]["answer"]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(words("check")) == 2
    assert "prompts.jsonl line 4: reward 'exact-answer' needs the field 'answer'" in capsys.readouterr().err
    rows[3]["answer"] = " "  # such as an empty cell of a CSV file
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(words("check", "reward.name=sum", parts)) == 2
    assert "prompts.jsonl line 4: reward 'exact-answer' needs the field 'answer'" in capsys.readouterr().err
    assert main(words("check", "data.on_bad_row=skip", "--output", "other")) == 0
    assert "line 4: reward 'exact-answer' needs the field 'answer'" in capsys.readouterr().out
