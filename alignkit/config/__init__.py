"""From a config file, flags and ``key.path=value`` to one typed config of a run, and the rules of its settings.

No torch here.
"""

from alignkit.config.resolve import (
    DataConfig,
    RunConfig,
    TopLevel,
    asked_stage,
    named_format,
    parse_override,
    resolve,
)
from alignkit.config.settings import Selected, merge, select

__all__ = [
    "DataConfig",
    "RunConfig",
    "Selected",
    "TopLevel",
    "asked_stage",
    "merge",
    "named_format",
    "parse_override",
    "resolve",
    "select",
]
