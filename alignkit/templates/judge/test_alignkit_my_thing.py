from alignkit_my_thing import Config, build

from alignkit import Question


def test_the_ranks_by_hand() -> None:
    question = Question(prompt=[], answers=("one two three", "one", "two"))

    assert list(build(Config(step=2), None)([question])) == [[1, 0, 0]]


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")
