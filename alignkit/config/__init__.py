"""Resolves a config file, flags and ``key.path=value`` to the typed config of a run. Imports no torch."""

from alignkit.config.resolve import DataConfig, resolve

__all__ = ["DataConfig", "resolve"]
