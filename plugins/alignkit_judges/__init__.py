"""Judges: functions that rank answers to the same prompt."""

from alignkit import Judge, hookimpl


@hookimpl
def alignkit_judge() -> list[Judge]:
    return []
