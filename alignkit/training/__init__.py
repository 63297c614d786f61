"""One run of one stage: where hooks meet a run, and what every trainer shares apart from its loss.

Importing this package imports no torch; using its names does.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = [
    "Means",
    "ReferenceTrainer",
    "RowMetrics",
    "Run",
    "StreamState",
    "StreamedExamples",
    "counted_rows",
    "execute",
    "last_logged",
    "load_with_reference",
    "loss_metrics",
    "reference_arguments",
]

if TYPE_CHECKING:
    from alignkit.training.execution import execute
    from alignkit.training.meters import Means, RowMetrics, counted_rows, last_logged
    from alignkit.training.reference_trainer import (
        ReferenceTrainer,
        load_with_reference,
        loss_metrics,
        reference_arguments,
    )
    from alignkit.training.run import Run
    from alignkit.training.streaming import StreamedExamples, StreamState
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
