"""Discovers plugins from package metadata, activates them by name, and checks what they return.

No torch here.
"""

from alignkit.registry.plugin import Plugin, installed
from alignkit.registry.registry import Registry

__all__ = ["Plugin", "Registry", "installed"]
