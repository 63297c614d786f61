"""What stages share that train on answers of their own policy.

Importing this package imports no torch; using its names does.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["RolesTrainer"]

if TYPE_CHECKING:
    from alignkit.online.roles_trainer import RolesTrainer
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
