"""Finished runs side by side: the same prompts, scores with error bars, answers before and after.

Nothing here imports torch at the top.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["error_bar", "read_answers_before", "standard_error", "write_answers"]

if TYPE_CHECKING:
    from alignkit.evaluation.before_after import read_answers_before, write_answers
    from alignkit.evaluation.error_bars import error_bar, standard_error
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
