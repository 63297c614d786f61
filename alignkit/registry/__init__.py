"""Discovers plugins from package metadata, activates them by name, and checks what they return.

No module here imports torch at module level.
"""

from alignkit.registry.plugin import Plugin, installed
from alignkit.registry.registry import Registry

__all__ = ["Plugin", "Registry", "installed"]
