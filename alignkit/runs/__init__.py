"""What a command will do and what it leaves: plans, lineage, run folders, fingerprints, and going on with a run.

Nothing here imports torch at the top.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["Parent", "is_run", "pipeline"]

if TYPE_CHECKING:
    from alignkit.runs.lineage import Parent
    from alignkit.runs.manifest import is_run
    from alignkit.runs.plan import pipeline
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
