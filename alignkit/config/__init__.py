"""From a config file, flags and ``key.path=value`` to one typed config of a run, and the rules of its settings.

No torch here.
"""

from alignkit.config.resolve import DataConfig, RunConfig, resolve
from alignkit.config.settings import Selected

__all__ = ["DataConfig", "RunConfig", "Selected", "resolve"]
