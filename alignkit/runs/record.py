"""The record in a run folder: the types of its values, and files that can be read. Anyone can edit these files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args

from alignkit.errors import AlignkitError

EDITED = "alignkit did not write it, or it was edited"
NAMES = {
    **{str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "a table"},
    **{NoneType: "null", datetime: "a time with a time zone"},
}


class Each(NamedTuple):
    """A table whose values are all of one type."""

    value: Any


# A type, a table with the types of its keys, or a list of one type. Other keys are allowed.
CONFIG: Mapping[str, Any] = {
    **{"model": str, "output": str, "plugins": [str], "chat_template": str | NoneType, "model_kwargs": {}},
    **{"tuner": {"name": str}, "optimizer": {"name": str}},
    "stages": Each({"data": {"path": str | list | NoneType}, "train": {}, "loss": {"name": str}}),
}
FINGERPRINTS: Mapping[str, Any] = {
    **{
        "weights": str | NoneType,
        "config": str | NoneType,
        "tokenizer": str | NoneType,
        "chat_template": str | NoneType,
        "special_tokens": {},
    },
}
MANIFEST: Mapping[str, Any] = {
    **dict.fromkeys(("stage", "role", "tuner", "loss", "weights", "dtype"), str),
    "model": {"name": str, "revision": str | NoneType, **FINGERPRINTS},
    "base": {"name": str, "located": str, "weights": str | NoneType, "config": str | NoneType},
    "fingerprints": FINGERPRINTS,
    "stop_ids": [int],
    "parents": Each({"folder": str, "weights": str | NoneType}),
    "round": int,
    "data": {
        **{"source": str, "fingerprint": str, "format": str, "sources": [{"path": str, "fingerprint": str}]},
        "eval_sources": [{"path": str, "fingerprint": str}],
        **{"train_rows": int, "eval_rows": int, "skipped_rows": int},
    },
    "metrics": Each(float | NoneType),
    "steps": int,
    "longer": list,
    "seconds": float,
    "finished": datetime,
    "processes": int,
    "versions": Each(str),
    "code": Each(str),
    "config": CONFIG,
}


def loads(text: str) -> Any:
    """Parse JSON, with an error of one kind whatever is wrong with it.

    Raises:
        ValueError: it is not valid, nested too deeply, or has an integer beyond the range of a float.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _integer(digits: str) -> int:
    number = int(digits)
    if abs(number) > sys.float_info.max:
        raise ValueError(f"{digits[:20]}... is too large")
    return number


# Files in the folder ``checkpoints``
TRAINER_STATE: Mapping[str, Any] = {
    **{"global_step": int, "max_steps": int, "epoch": float | NoneType, "log_history": [{}]},
    **{"stateful_callbacks": Each({"args": {}, "attributes": {}}), "best_model_checkpoint": str | NoneType},
}
SURROUNDINGS = Each(str | NoneType)
LONGER = [{"step": int, "settings": [str]}]


class Record(dict[str, Any]):
    """A table of a run's record. A key that it lacks is an :class:`alignkit.errors.AlignkitError`."""

    def __init__(self, content: Mapping[str, Any], file: Path, path: str = "") -> None:
        super().__init__(content)
        self.file, self.path = file, path

    def __missing__(self, key: str) -> Any:
        raise AlignkitError(f"{self.file} has no {self.path}{key}: {EDITED}")

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def read(file: Path, types: Any) -> Any:
    """The content of a JSON file, as :func:`checked` returns it.

    Raises:
        AlignkitError: it cannot be read, or a value has another type than in ``types``.
    """
    try:
        content = loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignkitError(f"cannot read {file}: {error}") from None
    return checked(content, types, file)


def checked(content: Any, types: Any, file: Path) -> Any:
    """The content of ``file``, with :class:`Record` as its tables.

    Raises:
        AlignkitError: a value has another type than in ``types``. A missing key is an error when it is read.
    """
    _check(content, types, file, "")
    return _recorded(content, file, "")


def check_files(folder: Path) -> None:
    """Check that a run folder has no pipes and no devices, nor links to them: to read one could take forever.

    Raises:
        AlignkitError: it has one.
    """
    for path in folder.rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise AlignkitError(f"{path} is neither a file nor a folder. alignkit does not read it: remove it")


def _recorded(value: Any, file: Path, path: str) -> Any:
    if isinstance(value, dict):
        return Record({key: _recorded(each, file, f"{path}{key}.") for key, each in value.items()}, file, path)
    return [_recorded(each, file, path) for each in value] if isinstance(value, list) else value


def _check(value: Any, types: Any, file: Path, path: str) -> None:
    if isinstance(types, Each):
        types = dict.fromkeys(value, types.value) if isinstance(value, dict) else {}
    kind = dict if isinstance(types, Mapping) else list if isinstance(types, list) else types
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not any(_is(value, each) for each in kinds):
        expected = " or ".join(NAMES[each] for each in kinds)
        raise AlignkitError(f"{file}: {path or 'the content'} must be {expected}: {EDITED}")
    if isinstance(types, Mapping):
        for key in types.keys() & value.keys():
            _check(value[key], types[key], file, f"{path}.{key}" if path else key)
    elif isinstance(types, list):
        for each in value:
            _check(each, types[0], file, path)


def _is(value: Any, kind: type) -> bool:
    if kind is datetime:
        return isinstance(value, str) and _is_time(value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
