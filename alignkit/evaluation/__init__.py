"""Finished runs side by side: the same prompts, and scores with error bars.

Nothing here imports torch at the top.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["HeldOutAnswers", "error_bar", "standard_error"]

if TYPE_CHECKING:
    from alignkit.evaluation.error_bars import error_bar, standard_error
    from alignkit.evaluation.held_out_answers import HeldOutAnswers
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
