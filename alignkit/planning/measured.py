"""The peak memory that finished runs have measured. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from alignkit.config import resume_rules
from alignkit.runs import lineage
from alignkit.runs.plan import Plan


class MeasuredPeak(NamedTuple):
    """The peak memory of a finished run."""

    run: Path  # its folder
    bytes: int  # of all tensors on the GPU at the same time


def measured_peak(plan: Plan) -> MeasuredPeak | None:
    """The peak of the newest run in the output folder with the settings of ``plan``; None if there is none.

    Settings that do not affect what a run computes may differ, and how long it trains.
    """
    for run in lineage.finished(Path(plan.config.output), plan.config.stage.component.name):
        assert run.manifest is not None
        peak = run.manifest.get("peak_memory")
        changes = resume_rules.changes(run.manifest["config"], plan.config)
        if peak is not None and all(change.resume != "same" for change in changes):
            return MeasuredPeak(run.folder, peak)
    return None
