"""When a finished run is used again: what it was made from is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_plan import folder as folder
from test_plan import run

from alignkit.cli import main


def test_the_default_model_is_not_looked_for_if_the_run_has_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few users with a model of their own have downloaded the bundled one."""
    monkeypatch.setattr("alignkit.bundled.has_gguf", lambda: False)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(folder / "empty"))
    assert main(["train", "-c", "run.yaml", "--plugin", "sft"]) == 0
    Path("run.yaml").write_text(Path("run.yaml").read_text().replace("model: base\n", ""))

    assert run() == 0
