"""Asks judges which answer is better: every pair in both orders, each question once, and makes ranks of the verdicts.

Importing this package imports no torch.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["Item", "OpenJudge", "Outcomes", "by_scores", "judge_answers", "judge_of_table", "read_samples"]

if TYPE_CHECKING:
    from alignkit.judging.choosing import by_scores, judge_of_table
    from alignkit.judging.comparing import Outcomes
    from alignkit.judging.judge import OpenJudge, judge_answers
    from alignkit.judging.samples import Item, read_samples
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
