"""Resolves a config file, flags and ``key.path=value`` to the typed config of a run. Imports no torch."""

from alignkit.config.resolve import DataConfig, RunConfig, resolve
from alignkit.config.settings import Selected

__all__ = ["DataConfig", "RunConfig", "Selected", "resolve"]
