"""What a run takes from the run that it starts from, and which runs share a base in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.runs import lineage

LORA = {"name": "lora", "r": 16}
RECORD: dict[str, Any] = {
    "stage": "sft",
    "weights": "adapter",
    "base": {"name": "m", "weights": "abc"},
    "config": {
        "model": "m",
        "tuner": LORA,
        "chat_template": "t.jinja",
        "model_kwargs": {"revision": "v1", "device_map": "auto", "trust_remote_code": True},
        "optimizer": {"name": "adamw"},
    },
}


class Config:
    """As much of a ``RunConfig`` as decides whether bases are shared."""

    def __init__(self, **changed: Any) -> None:
        self.table = {"tuner": LORA, "model_kwargs": {}, **changed}

    def to_dict(self) -> dict[str, Any]:
        return self.table


def test_a_run_inherits_what_its_base_and_its_tokens_are_and_no_trust() -> None:
    assert lineage.inherited(lineage.Parent("sft", Path("runs/sft"), RECORD)) == {
        "model": "m",
        "tuner": LORA,
        "chat_template": "t.jinja",
        "model_kwargs": {"revision": "v1"},
    }


@pytest.mark.parametrize(
    ("record", "config", "base", "shared"),
    [
        ({}, {}, "abc", True),
        ({}, {"tuner": {**LORA, "new_setting": None}}, "abc", True),  # of a later version
        ({}, {}, "other", False),
        ({}, {}, None, False),
        ({"weights": "model"}, {}, "abc", False),
        ({}, {"tuner": {"name": "qlora", "r": 16}}, "abc", False),
        ({}, {"model_kwargs": {"rope_theta": 5.0}}, "abc", False),
        ({}, {"model_kwargs": {"revision": "v2"}}, "abc", True),  # of the same weights
    ],
)
def test_a_base_is_shared_by_adapters_of_the_same_tuner_on_the_same_weights(
    record: dict[str, Any], config: dict[str, Any], base: str | None, shared: bool
) -> None:
    assert lineage.shares_base({**RECORD, **record}, Config(**config), base) == shared  # type: ignore[arg-type]
