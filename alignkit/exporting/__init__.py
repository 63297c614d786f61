"""A finished run as a standard Transformers model folder, verified against the run.

Nothing here imports torch at the top.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["Exported", "export"]

if TYPE_CHECKING:
    from alignkit.exporting.writing import Exported, export
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
