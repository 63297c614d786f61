"""The grid of settings of a sweep: every combination of the values of settings that have several."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignkit.config.resolve import parse_override
from alignkit.errors import ConfigError

OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""
SEED = "train.seed"
NAME_LENGTH = 100  # of a folder, at most


class Grid(NamedTuple):
    """The settings of a sweep as on the command line."""

    fixed: list[str]  # KEY=VALUE
    varied: dict[str, list[str]]  # KEY -> its values

    def combinations(self) -> Iterator[dict[str, str]]:
        """Each combination of the varied settings; the last one varies fastest."""
        for values in itertools.product(*self.varied.values()):
            yield dict(zip(self.varied, values, strict=True))


def parse(overrides: Sequence[str]) -> Grid:
    """Split overrides into those with one value and those with several, separated by commas.

    A comma inside brackets, braces or quotes does not separate: ``data.path=[a.jsonl,b.jsonl],c.jsonl`` has two values.

    Raises:
        ConfigError: no setting has several values; a value is empty, or occurs twice; a setting with several values is
            given twice.
    """
    fixed, varied = list[str](), dict[str, list[str]]()
    for override in overrides:
        key, equals, text = override.partition("=")
        values = split(text)
        if not equals or len(values) == 1:
            fixed.append(override)
            continue
        if "" in values:
            raise ConfigError(f"{override}: a value is empty")
        if key in varied:
            raise ConfigError(f"{key} is given twice")
        parsed = [parse_override(f"{key}={value}") for value in values]
        for number, value in enumerate(values):
            if parsed[number] in parsed[:number]:
                raise ConfigError(f"{override}: the value {value} is given twice")
        varied[key] = values
    if not varied:
        raise ConfigError(
            "sweep: no setting has several values. Separate them by commas, such as train.seed=1,2,3. To train one "
            "run, use alignkit train"
        )
    if twice := [key for override in fixed if (key := override.partition("=")[0]) in varied]:
        raise ConfigError(f"{twice[0]} is given twice")
    return Grid(fixed, varied)


def split(text: str) -> list[str]:
    """The parts of a text between commas that are not inside brackets, braces or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and not parts[-1].strip():  # an apostrophe inside a word is text
            quote = character
        else:
            depth += (character in OPENING) - (character in CLOSING)
        if character == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def label_of(settings: Mapping[str, str], keys: Sequence[str], separator: str = " ") -> str:
    """A combination as text, such as ``kl_coef=0.02 seed=1``. ``keys`` are all varied settings of the sweep."""
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
    return separator.join(f"{short[key]}={value}" for key, value in settings.items())


def folder_name(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    """A name for the folder of a combination, such as ``kl_coef=0.02_seed=1``."""
    text = label_of(settings, keys, "_")
    name = re.sub(r"[^\w.=+-]+", "-", text).strip("-")
    if name == text and len(name) <= NAME_LENGTH:
        return name
    return f"{name[:NAME_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"  # different values, other names


def is_seed(key: str) -> bool:
    """Whether a setting is the seed of training, over which results are averaged."""
    return key == SEED or key.endswith(f".{SEED}")


def value_at(key: str, value: str) -> Any:
    """The value of a setting as it is read from the command line."""
    table: Any = parse_override(f"{key}={value}")
    for part in key.split("."):
        table = table[part]
    return table
