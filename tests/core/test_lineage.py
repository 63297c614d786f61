"""What a run takes from the run that it starts from, and which runs share a base in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import ConfigError
from alignkit.runs import lineage, resume

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


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokenizer": "2"}, "tokenizer"),
        ({"chat_template": None}, "chat template"),
        ({"special_tokens": {"eos_token": "</s>"}}, r"eos_token \('<eos>', '</s>'\)"),
    ],
)
def test_runs_with_other_tokens_cannot_be_combined(changed: dict[str, Any], named: str) -> None:
    tokens = {"weights": "w", "tokenizer": "1", "chat_template": "t", "special_tokens": {"eos_token": "<eos>"}}
    one, same, other = (
        lineage.Parent("rm", Path(name), {"fingerprints": {**tokens, **differing}})
        for name, differing in (("one", {}), ("same", {"weights": "v"}), ("other", changed))
    )

    lineage.check_same_tokens(one, same)
    with pytest.raises(ConfigError, match=f"one and other cannot be combined: they differ in {named}"):
        lineage.check_same_tokens(one, other)


def test_a_checkpoint_is_complete_with_the_state_of_its_own_step(tmp_path: Path) -> None:
    for name, content in {"4": '{"global_step": 4}', "6": '{"global_step": 4}', "8": "{", "10": None}.items():
        folder = tmp_path / "checkpoints" / f"checkpoint-{name}"
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "trainer_state.json").write_text(content)

    assert [each.name for each in resume.checkpoints(tmp_path)] == ["checkpoint-4"]
