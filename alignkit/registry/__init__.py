"""Plugins: found by their metadata, activated when they are named, looked up by component; what they give is checked.

No torch here.
"""

from alignkit.registry.plugin import Plugin, installed
from alignkit.registry.registry import Registry

__all__ = ["Plugin", "Registry", "installed"]
