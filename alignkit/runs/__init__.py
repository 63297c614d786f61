"""Plans, lineage, run folders, fingerprints and resume: what a command will do, and what it saves.

No module here imports torch at module level.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = [
    "fingerprint",
    "is_run",
    "locate_model",
    "make_plan",
    "model_folder",
    "pipeline",
    "read_answers",
    "read_manifest",
    "write_answers",
    "write_json",
]

if TYPE_CHECKING:
    from alignkit.runs.answers import read as read_answers
    from alignkit.runs.answers import write as write_answers
    from alignkit.runs.base import folder_of as model_folder
    from alignkit.runs.base import locate as locate_model
    from alignkit.runs.fingerprints import of as fingerprint
    from alignkit.runs.manifest import is_run, write_json
    from alignkit.runs.manifest import read as read_manifest
    from alignkit.runs.plan import make as make_plan
    from alignkit.runs.plan import pipeline
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
