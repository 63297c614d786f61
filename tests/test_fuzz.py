"""No mistake in rows, files, settings or requests ends in a traceback or in "This is unexpected"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import label_clients
import label_requests
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_samples import numbered

from alignkit.testing import SMALL

KEYS = fuzzing.known_keys()
STAGES = st.sampled_from(fuzzing.STAGES)
SEEDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def common(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of every command."""
    monkeypatch.chdir(tmp_path)
    return ["--model", str(tiny_model()), "--output", str(tmp_path / "runs")]


@settings(SEEDED, max_examples=80)
@given(stage=STAGES, made=st.lists(fuzzing.files(), min_size=1, max_size=2), whole=st.booleans(), skip=st.booleans())
def test_rows_and_files(
    common: list[str], tmp_path: Path, stage: str, made: list[fuzzing.File], whole: bool, skip: bool
) -> None:
    folder = fuzzing.write(tmp_path / "data", made)
    data = str(folder if whole else folder / made[0].name)
    mode = f"data.on_bad_row={'skip' if skip else 'error'}"
    assert fuzzing.fault(["check", "--plugin", stage, "--data", data, f"{stage}.{mode}", *common]) is None


@settings(SEEDED, max_examples=150)
@given(stage=STAGES, overrides=fuzzing.settings(KEYS), text=fuzzing.config_files(KEYS))
def test_settings(common: list[str], tmp_path: Path, stage: str, overrides: list[str], text: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert fuzzing.fault(["check", "--config", "run.yaml", "--plugin", stage, *common, *overrides]) is None


NUMBERS = {stage: fuzzing.numeric_keys(stage) for stage in ("sft", "rm", "dpo")}


@settings(SEEDED, max_examples=10)
@given(drawn=st.data(), stage=st.sampled_from(sorted(NUMBERS)))
def test_runs_of_two_steps(common: list[str], tmp_path: Path, drawn: st.DataObject, stage: str) -> None:
    overrides = drawn.draw(fuzzing.numbers(NUMBERS[stage]))
    made = drawn.draw(fuzzing.rows_of_stage(stage))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    data = ["--data", "rows.jsonl", f"{stage}.data.on_bad_row=skip"]
    base = [] if stage == "sft" else [f"{stage}.policy=base"]
    assert fuzzing.fault(["train", "--overwrite", "--plugin", stage, *common, *data, *base, *SMALL, *overrides]) is None


@pytest.fixture
def label_site(sites: Any) -> label_clients.Site:
    return sites(numbered(100, k=2), scale=5, flags=["rude"])


@settings(SEEDED, max_examples=80)
@given(sent=label_requests.requests())
def test_requests_to_the_page_of_label(label_site: label_clients.Site, sent: label_requests.Sent) -> None:
    assert label_requests.fault(label_site.labeler(), sent) is None
