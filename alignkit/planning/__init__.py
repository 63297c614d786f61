"""Estimates of a run before it starts: its memory, from the steps of its own trainer on tensors without data.

Importing this package imports no torch; using its names does.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["Memory", "measured_peak", "memory"]

if TYPE_CHECKING:
    from alignkit.planning.estimate import Memory, memory
    from alignkit.planning.measured import measured_peak
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
