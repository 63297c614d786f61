"""Sampling answers from a policy, scoring them, and chat.

Importing this package imports no torch; using its names does.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["build_reward", "generate", "import_scorer", "locate_policy", "open_model", "sample", "text"]

if TYPE_CHECKING:
    from alignkit.generation.chat import locate as locate_policy
    from alignkit.generation.chat import open_model
    from alignkit.generation.hf_generate import generate
    from alignkit.generation.rankings import import_scorer
    from alignkit.generation.rewards import build_reward
    from alignkit.generation.sampling import sample, text
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
