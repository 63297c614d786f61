"""The fingerprint of a function changes with what it computes, and with nothing else."""

from __future__ import annotations

import functools
import subprocess
import sys
from types import FunctionType
from typing import Any

import pytest

from alignkit.registry import code


def reward(source: str, **names: Any) -> Any:
    """The function ``reward`` of a notebook with this source, in which other names are defined."""
    scope: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, scope)
    return scope["reward"]


def fingerprint(source: str, **names: Any) -> str:
    return code.fingerprint({"function": reward(source, **names)})


PLAIN = "def reward(prompts, answers):\n    return [len(answer) * scale for answer in answers]\n"


def test_the_same_code_has_the_same_fingerprint_in_another_place_and_with_other_comments() -> None:
    moved = "\n\n" + PLAIN.replace("return", "# the longer, the better\n    return")

    assert fingerprint(PLAIN, scale=2) == fingerprint(moved, scale=2)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (PLAIN.replace("*", "+"), {"scale": 2}),  # the code
        (PLAIN, {"scale": 3}),  # a global value
        (PLAIN.replace("scale", "2"), {"scale": 2}),
        (PLAIN.replace("answers)", "answers, more=1)"), {"scale": 2}),  # a default
        (PLAIN.replace("len", "abs"), {"scale": 2}),  # another builtin
    ],
)
def test_another_computation_has_another_fingerprint(source: str, names: dict[str, Any]) -> None:
    assert fingerprint(source, **names) != fingerprint(PLAIN, scale=2)


def test_functions_classes_and_variables_that_it_uses_count() -> None:
    uses = (
        "def helper(text): return len(text) * {}\n\ndef reward(prompts, answers): return [helper(a) for a in answers]"
    )
    method = (
        "class Scorer:\n    def score(self, a): return {}\n\ndef reward(p, a): return [Scorer().score(x) for x in a]"
    )
    inner = "def outer(n):\n    def reward(p, a): return [n] * len(a)\n    return reward\nreward = outer({})"
    colors = "import enum\nclass Color(enum.Enum):\n    RED = 1\n    def score(self): return {}\n"
    colors += "def reward(p, a, color=Color.RED): return [color.score() for _ in a]"
    for source in (
        uses,
        method,
        inner,
        colors,
        "WORDS = ['{}']\ndef reward(p, a): return [w in x for w in WORDS for x in a]",
    ):
        assert fingerprint(source.format(1)) == fingerprint(source.format(1))
        assert fingerprint(source.format(1)) != fingerprint(source.format(2))
    partial = [functools.partial(reward(PLAIN, scale=1), more=n) for n in (1, 1, 2)]
    same, equal, other = (code.fingerprint({"function": each}) for each in partial)
    assert same == equal != other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("re.compile('a')", "re.compile('b')"),
        ("re.compile('a')", "re.compile('a', re.IGNORECASE)"),
        ("re.compile('a' * 300 + 'b')", "re.compile('a' * 300 + 'c')"),  # longer than what is shown of a pattern
        ("[re.compile('a')]", "[re.compile('b')]"),
        ("pathlib.Path('a')", "pathlib.Path('b')"),
        ("datetime.date(2026, 1, 1)", "datetime.date(2026, 1, 2)"),
        ("decimal.Decimal('0.1')", "decimal.Decimal('0.2')"),
        ("collections.deque(['a'])", "collections.deque(['b'])"),
        ("http.HTTPStatus.OK", "http.HTTPStatus.CREATED"),
        ("uuid.SafeUUID.safe", "uuid.SafeUUID.unsafe"),
        ("bytearray(b'a')", "bytearray(b'b')"),
    ],
)
def test_plain_values_of_the_standard_library_count(one: str, other: str) -> None:
    """Whether a module defines them, or a function has them as a default."""
    imports = "import collections, datetime, decimal, http, pathlib, re, uuid\n"
    for function in ("VALUE = {}\ndef reward(p, a): return [VALUE]", "def reward(p, a, value={}): return [value]"):
        first, same, second = (fingerprint(imports + function.format(value)) for value in (one, one, other))
        assert first == same != second


CALL = "def __call__(self, p, a): return [{}]"
SCORE = "def score(x): return {}\n"
USES = "def reward(p, a): return [score(x) for x in a]"


@pytest.mark.parametrize(
    "source",
    [
        f"import functools\n@functools.cache\n{SCORE}{USES}",
        f"import functools\n@functools.lru_cache(8)\n{SCORE}{USES}",
        "import functools\n@functools.cache\ndef reward(p, a): return [{}]",
        "import functools\n@functools.singledispatch\ndef score(x): return 0\n"
        f"@score.register\ndef _(x: str): return {{}}\n{USES}",
        f"import dataclasses\n@dataclasses.dataclass\nclass C:\n    t: int = 3\n    {CALL}\nreward = C()",
        f"import typing\nclass C(typing.NamedTuple):\n    t: int = 3\n    {CALL}\nreward = C()",
        f"class B:\n    {CALL}\nclass C(B): pass\nreward = C()",
        "class B:\n    def f(self): return {}\nclass C(B): pass\ndef reward(p, a): return [C().f()]",
        "class C:\n    @property\n    def f(self): return {}\ndef reward(p, a): return [C().f]",
        "import functools\nclass C:\n    @functools.cached_property\n    def f(self): return {}\n"
        "def reward(p, a): return [C().f]",
        "class C:\n    def __init__(self): self.scale = {}\ndef reward(p, a): return [C().scale]",
        "class C:\n    def __getitem__(self, key): return {}\nc = C()\ndef reward(p, a): return [c[0]]",
        "class C:\n    __slots__ = ('scale',)\n    def __init__(self, scale): self.scale = scale\n"
        "    def __call__(self, p, a): return [self.scale]\nreward = C({})",
        "class F(float):\n    def f(self): return {}\nf = F(1)\ndef reward(p, a): return [f.f()]",
        "import collections\ntable = collections.defaultdict(lambda: {})\ndef reward(p, a): return [table[0]]",
        "import operator\nget = operator.attrgetter('a{}')\ndef reward(p, a): return [get(x) for x in a]",
        "import numpy\nscale = numpy.float32({})\ndef reward(p, a): return [scale]",
        "import numpy\nscale = numpy.int64({})\ndef reward(p, a): return [scale]",
    ],
)
def test_a_change_behind_a_decorator_or_in_a_class_counts(source: str) -> None:
    assert fingerprint(source.format(1)) == fingerprint(source.format(1)) != fingerprint(source.format(2))


def test_calls_do_not_change_what_keeps_their_results() -> None:
    source = (
        "import functools\n"
        "@functools.singledispatch\n@functools.cache\ndef score(x): return 0\n"
        "class C:\n    @functools.cached_property\n    def f(self): return 1\n"
        "    def __call__(self, p, a): return [self.f + score(x) for x in a]\nreward = C()"
    )
    scorer = reward(source)
    before = code.fingerprint({"function": scorer})
    assert scorer([], ["a"]) == [1]

    assert code.fingerprint({"function": scorer}) == before


def test_a_recursive_function_and_an_unassigned_variable_are_no_problem() -> None:
    fingerprint("def reward(p, a): return reward(p, a[1:]) if a else []")
    fingerprint("class C:\n    def f(self): return ALL\nALL = {C()}\ndef reward(p, a): return [C().f()]")
    fingerprint("def outer():\n    def reward(p, a): return later\n    return reward\n    later = 1\nreward = outer()")


def test_it_does_not_depend_on_the_random_seed_of_hashes() -> None:
    script = (
        "from alignkit.registry import code\n"
        "import abc, dataclasses, enum, functools, typing\n"
        "class Color(enum.Enum): RED = 1\n"
        "class Base(abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...\n"
        "@dataclasses.dataclass\nclass Data(Base):\n    t: list = dataclasses.field(default_factory=list)\n"
        "    def f(self): return Color.RED\n"
        "class Pair(typing.NamedTuple): a: int = 1\n"
        "@functools.singledispatch\ndef score(x): return Data().f(), Pair()\n"
        "def reward(p, a): return [x in {'good', 'bad', 'fair', 'poor'} and score(x) for x in a]\n"
        "print(code.fingerprint({'function': reward}))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }

    assert len(outputs) == 1


def test_the_source_of_a_function_is_what_was_written() -> None:
    assert code.source(reward) == code.source(FunctionType(reward.__code__, {}))
    assert str(code.source(reward)).startswith("def reward(source: str")
    assert code.source(reward("def reward(p, a): return a")) is None
