"""Rows, files and settings with mistakes in them, as Hypothesis strategies, and what must not come of them.

``test_fuzz.py`` tries a few hundred, ``benchmarks/fuzz.py`` as many thousands as it is asked for.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from alignkit.cli import main
from alignkit.config import resolve
from alignkit.registry import Registry
from alignkit.testing import DATA

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ROWS: list[dict[str, Any]] = [  # one of each format
    *(rows[1] for rows in DATA.values()),
    {"messages": TURNS},
    {
        "messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, TURNS[1]],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]},
    {"instruction": "Add", "input": "2 3", "output": "5", "system": "Be kind"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"chosen": [*TURNS, *TURNS], "rejected": [*TURNS, TURNS[0], {"role": "assistant", "content": "Go"}], "margin": 1.5},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [1, None, 2], "margins": [3.0, 0.0, 1.0]},
]
STAGES = ("sft", "rm", "dpo", "ppo")

TEXT = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Lu", "Zs", "So"]), max_size=8),
    st.sampled_from(["", " ", "\x00", "nan", "null", "<eos>", "{{ x }}", "{% if %}", "x" * 5000, "\ud800", "é\u2028"]),
)
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([10**400, -(2**63), 1e308, 0.5]),
    TEXT,
)
ANYTHING = st.recursive(
    SCALAR, lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXT, some, max_size=3), max_leaves=8
)


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Rows of a format, with no to three mistakes."""
    made: Any = [json.loads(json.dumps(draw(st.sampled_from(ROWS)))) for _ in range(draw(st.integers(1, 2)))] * 4
    for _ in range(draw(st.integers(0, 3))):
        made[draw(st.integers(0, len(made) - 1))] = draw(mistaken(draw(st.sampled_from(made))))
    return list(made)


@st.composite
def rows_of_stage(draw: st.DrawFn, stage: str) -> list[Any]:
    """Sixteen rows that a stage trains on, of which up to three have odd texts or mistakes."""
    kinds = {"sft": ["demonstrations", "text"], "rm": ["rankings", "preferences"], "dpo": ["preferences", "rankings"]}
    made: list[Any] = json.loads(json.dumps(DATA[draw(st.sampled_from(kinds[stage]))]))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(made) - 1))
        key = draw(st.sampled_from(sorted(made[place])))
        odd = draw(TEXT) if isinstance(made[place][key], str) else draw(mistaken(made[place][key]))
        made[place] = {**made[place], key: odd}
    return made


@st.composite
def mistaken(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with something in it replaced, removed, or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 5)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                known = ["prompt", "text", "weight", "train", "tools", "tool_calls", "margin", "name", "data"]
                return {**value, draw(TEXT | st.sampled_from(known)): draw(ANYTHING)}
        return {**value, key: draw(mistaken(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        match draw(st.integers(0, 5)):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, value[place]]
        return [*value[:place], draw(mistaken(value[place])), *value[place + 1 :]]
    return draw(ANYTHING)


class File(NamedTuple):
    """A file to write: its name and its bytes."""

    name: str
    content: bytes


@st.composite
def files(draw: st.DrawFn) -> File:
    """Rows in a file of any ending, perhaps cut, in another encoding, or with bytes that are wrong."""
    ending = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".txt", ""]))
    content = WRITERS.get(ending, _jsonl)(draw(rows()))
    if draw(st.integers(0, 2)) == 0:
        at = draw(st.integers(0, len(content)))
        match draw(st.integers(0, 7)):
            case 0:
                content = content[:at]
            case 1:
                content = b"\xef\xbb\xbf" + content
            case 2:
                content = content.replace(b"\n", b"\r\n")
            case 3:
                content = content.decode("latin-1").encode(draw(st.sampled_from(["utf-16", "utf-8"])))
            case 4:
                content = content[:at] + draw(st.binary(max_size=5)) + content[at + 1 :]
            case 5:
                content = content[:at] + b"[" * 3000 + content[at:]
            case 6:
                content = content[:at] + b"9" * 5000 + content[at:]
            case 7:
                content = draw(st.sampled_from([b"", b"\n\n", b"\x00" * 9, b"[]", b"{}", b"null", b'{"data": 3}']))
    stem = draw(st.sampled_from(["rows", "train", "test", "train-00000-of-00002", "a b", "é"]))
    return File(stem + ending, content)


def _jsonl(made: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def _csv(made: list[Any]) -> bytes:
    records = [row for row in made if isinstance(row, dict)]
    columns = list(dict.fromkeys(key for row in records for key in row))
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows([[row.get(column) for column in columns] for row in records])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _parquet(made: list[Any]) -> bytes:
    stream = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in made if isinstance(row, dict)]), stream)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, AttributeError):  # not all of one type
        return b"PAR1 PAR1"
    return stream.getvalue()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    ".json": lambda made: json.dumps(made).encode(),
    ".csv": _csv,
    ".parquet": _parquet,
}


def _keys(table: Mapping[str, Any], path: str = "") -> list[str]:
    """Every key path of a config."""
    deeper = [_keys(value, f"{path}{key}.") for key, value in table.items() if isinstance(value, Mapping)]
    return [*(f"{path}{key}" for key in table), *(key for keys in deeper for key in keys)]


def known_keys() -> list[str]:
    """The key paths of every stage's config, and some that only look like them."""
    configs = [resolve(Registry(), {}, {"plugins": [stage]}).to_dict() for stage in STAGES]
    found = [key.removeprefix("stages.") for config in configs for key in _keys(config)]
    shared = [
        "data.path",
        "data.format",
        "data.format.name",
        "data.split",
        "data.eval_path",
        "data.eval_size",
        "stages",
    ]
    more = [
        "train.optim",
        "train.eval_strategy",
        "train.deepspeed",
        "reward.name",
        "loss.name",
        "tuner.nosuch",
        "stage",
    ]
    return list(dict.fromkeys([*found, *shared, *more]))


@st.composite
def settings(draw: st.DrawFn, keys: list[str]) -> list[str]:
    """Overrides: known keys with any value, and no overrides at all."""
    value = st.one_of(
        SCALAR.map(str), ANYTHING.map(lambda made: json.dumps(made, ensure_ascii=False)), TEXT, st.sampled_from(keys)
    )
    known = st.tuples(st.sampled_from(keys), value).map("=".join)
    other = TEXT.filter(lambda text: not text.startswith("-"))
    return [draw(known if draw(st.integers(0, 9)) else other) for _ in range(draw(st.integers(0, 2)))]


NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([0.0, 0.5, 1e-9, 1e30, float("nan"), float("inf"), 10**20]))


@st.composite
def numbers(draw: st.DrawFn, keys: list[str]) -> list[str]:
    """Overrides of a run that may start: one known key of a number, with any number that its kind may have."""
    return [f"{draw(st.sampled_from(keys))}={draw(NUMBERS)}" for _ in range(draw(st.integers(0, 1)))]


def numeric_keys(stage: str) -> list[str]:
    """The keys of a stage's config that hold a number, less those that make a run long."""
    config = resolve(Registry(), {}, {"plugins": [stage]}).to_dict()
    long = ("num_train_epochs", "max_steps", "iterations", "response_length", "batch_size")
    found = [key.removeprefix("stages.") for key in _keys(config) if isinstance(_at(config, key), int | float)]
    return [key for key in found if not key.endswith(long)]


def _at(table: Any, path: str) -> Any:
    for key in path.split("."):
        table = table[key]
    return table


@st.composite
def config_files(draw: st.DrawFn, keys: list[str]) -> str:
    """A config file's text: tables of known keys with any value, or no YAML."""
    table: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(keys), max_size=2)):
        *tables, last = key.split(".")
        inner = table
        for name in tables:
            inner = inner[name] if isinstance(inner.get(name), dict) else inner.setdefault(f"{name}", {})
            if not isinstance(inner, dict):
                break
        else:
            inner[last] = draw(SCALAR | ANYTHING)
    text = json.dumps(table)
    broken = st.sampled_from(
        [text[:-1], "- a", "a: b: c", "{a: &x 1, b: *x}", "\x00", "a: !!python/none", "a: 2024-01-01"]
    )
    return text if draw(st.integers(0, 9)) else draw(broken)


# --- what must not come of it ----------------------------------------------------------------------------------------


def write(folder: Path, made: list[File]) -> Path:
    """A fresh folder with the files in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in made:
        (folder / file.name).write_bytes(file.content)
    return folder


def fault(arguments: list[str]) -> str | None:
    """What is wrong with how the command ends: an exception, "unexpected", a traceback, an error of several lines."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    said = err.getvalue()
    if status not in (0, 1, 2):
        return f"exit status {status}: {said}"
    for word in ("This is unexpected", "Traceback"):
        if word in said + out.getvalue():
            return said
    lines = [line for line in said.splitlines() if line.strip()]
    if status == 2 and (not lines or not lines[-1].startswith("alignkit: error: ")):
        return f"an error of several lines: {said}"
    return None
