"""Finished runs side by side: the same prompts, scores with error bars, answers before and after.

Only ``answering`` imports torch at the top.
"""

__all__: list[str] = []
