"""Models and the roles that they play: adapters on one trunk, log-probabilities, number formats and devices.

Importing this package imports no torch; using its names does.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = [
    "Logps",
    "Member",
    "Roles",
    "Sequences",
    "assemble",
    "copy_adapter",
    "open_run",
    "run_device",
    "run_dtype",
    "use_adapter",
    "without_dropout",
]

if TYPE_CHECKING:
    from alignkit.models.adapters import copy_adapter, open_run, without_dropout
    from alignkit.models.device import run_device, run_dtype
    from alignkit.models.trunk import Logps, Member, Roles, Sequences, assemble, use_adapter
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
