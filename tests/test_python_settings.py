"""Arguments of Python calls that no config file can have."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
import pytest
import torch

import alignkit
from alignkit.api.settings import plain
from alignkit.config.settings import typed


def test_settings_may_be_objects_of_numpy_and_torch() -> None:
    given = {"a": numpy.float64(1e-6), "b": [numpy.str_("eager"), torch.float32], "c": torch.tensor(2), "d": {"x"}}
    converted = plain(given)

    assert repr(converted) == "{'a': 1e-06, 'b': ['eager', 'float32'], 'c': 2, 'd': ['x']}"
    with pytest.raises(alignkit.ConfigError, match=r"^train.lr_scheduler_kwargs is a object. Give a number, a string"):
        alignkit.check("sft", train={"lr_scheduler_kwargs": object()})


def test_arguments_of_the_wrong_type_are_errors() -> None:
    samples = [{"prompt": "a", "responses": ["b", "c"]}]
    for by in (3, None):
        with pytest.raises(alignkit.ConfigError, match=f"^by is {by}. Give a name, a run, a table or a function$"):
            alignkit.rank(samples, by=by)  # type: ignore[arg-type]
    with pytest.raises(alignkit.ConfigError, match="^load takes a run or its folder, not None$"):
        alignkit.load(None)  # type: ignore[arg-type]
    with pytest.raises(alignkit.PluginError, match="NoneType is not a plugin"):
        alignkit.check("sft", plugins=None)  # type: ignore[arg-type]


@dataclass
class Steps:
    at: dict[int, float] = field(default_factory=dict)


def test_keys_may_be_numbers() -> None:
    assert typed(Steps, {"at": {1: 2.0}}, "loss.").at == typed(Steps, {"at": {"1": 2}}, "loss.").at == {1: 2.0}
