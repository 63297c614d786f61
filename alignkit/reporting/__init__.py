"""The report on a set of runs: one HTML page with what was trained from what, whether it worked, and what it cost.

No module here imports torch.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["report"]

if TYPE_CHECKING:
    from alignkit.reporting.page import report
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
