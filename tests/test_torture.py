"""Runs that are killed or disturbed at random moments, as ``benchmarks/torture.py`` does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "torture.py"


@pytest.mark.slow
def test_runs_that_are_killed_or_disturbed_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """Twenty kills of all stages, and a full disk, a read-only folder, a jumping clock and a second process.

    Resumed, the folder of each run is that of an uninterrupted one.
    """
    options = ["--kills", "20", "--disturbances", "4", "--seed", "3", "--tuners", "lora", "full"]
    options += ["--output", str(tmp_path / "results.jsonl")]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 runs differ" in done.stdout
