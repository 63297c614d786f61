"""TRL's fused language-model head, which gives log-probabilities without ever building the logits.

``trl.trainer.add_fused_lm_head`` projects positions through the head in tiles. Everything here that leans on TRL's
insides is in this module, so that a release of TRL changes one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import trl.trainer.utils


@contextmanager
def labelled_positions_only() -> Iterator[None]:
    """Inside, the head is applied only where there is a label, on every device.

    TRL does so where Triton runs and scores every position elsewhere, to keep shapes constant for devices that
    compile. On a CPU the prompt's and the padding's share of the head is 30 % of a step.
    """

    def compact(device: Any) -> bool:
        return bool(device.type != "neuron")

    with mock.patch.object(trl.trainer.utils, "_use_triton", compact):
        yield
