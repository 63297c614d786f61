"""What alignkit uses of TRL that is not its public API. ``tests/test_internals.py`` fails when a release changes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trl.trainer.dpo_trainer
import trl.trainer.sft_trainer


@contextlib.contextmanager
def adapter_on_head() -> Iterator[None]:
    """Build an ``SFTTrainer`` or ``DPOTrainer`` although the head has an adapter (TRL 1.16).

    TRL refuses such a model, because its fused head would leave the adapter out. Ours computes all logits there. The
    check is ``isinstance(head, BaseTunerLayer)``, with the name imported into each trainer's module.
    """
    modules = trl.trainer.sft_trainer, trl.trainer.dpo_trainer
    former = [module.BaseTunerLayer for module in modules]
    for module in modules:
        module.BaseTunerLayer = ()
    try:
        yield
    finally:
        for module, cls in zip(modules, former, strict=True):
            module.BaseTunerLayer = cls
