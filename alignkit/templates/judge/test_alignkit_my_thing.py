import json

from alignkit_my_thing import Config, build

from alignkit import Question
from alignkit.cli import main


def test_the_ranks_by_hand() -> None:
    question = Question(prompt=[], answers=("one two three", "one", "two"))

    assert list(build(Config(step=2), None)([question])) == [[1, 0, 0]]


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_it_ranks_a_file_of_answers(tmp_path) -> None:
    answers, ranked = tmp_path / "answers.jsonl", tmp_path / "ranked.jsonl"
    answers.write_text(json.dumps({"prompt": "Hello!", "responses": ["Hello to you!", "Hello!"]}))

    assert main(["rank", str(answers), "--by", "my-thing", "-p", "my-thing", "-o", str(ranked), "judge.step=1"]) == 0
    assert json.loads(ranked.read_text())["ranks"] == [1, 0]
