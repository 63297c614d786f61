"""Uses of TRL's internals. ``tests/test_internals_of_trl.py`` fails when a release changes it.

Everything here was checked with TRL 1.16. ``disable_gradient_checkpointing`` switches it off for a forward without
gradients, and on again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import trl.trainer.dpo_trainer
import trl.trainer.kto_trainer
import trl.trainer.sft_trainer
from torch import Tensor, nn
from trl.kernels import chunked_logprob
from trl.models.utils import disable_gradient_checkpointing

__all__ = ["adapter_on_head", "disable_gradient_checkpointing", "head_in_place", "kept_dtypes"]


@contextlib.contextmanager
def adapter_on_head() -> Iterator[None]:
    """Build an ``SFTTrainer``, ``DPOTrainer`` or ``KTOTrainer`` although the head has an adapter.

    TRL refuses such a model, because its fused head would leave the adapter out. Ours computes all logits there. The
    check is ``isinstance(head, BaseTunerLayer)``, with the name imported into each trainer's module.
    """
    modules = trl.trainer.sft_trainer, trl.trainer.dpo_trainer, trl.trainer.kto_trainer
    former = [module.BaseTunerLayer for module in modules]
    for module in modules:
        module.BaseTunerLayer = ()
    try:
        yield
    finally:
        for module, cls in zip(modules, former, strict=True):
            module.BaseTunerLayer = cls


@contextlib.contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Build one of TRL's trainers, and the trained weights of ``model`` keep their values and dtypes.

    TRL casts the adapters of a quantized model to bf16, where small updates are lost. The weights come back when
    the context ends, or earlier, when the function that it yields is called.
    """
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}

    def restore() -> None:
        for name, parameter in model.named_parameters():
            if name in trained and parameter.dtype is not trained[name].dtype:
                parameter.data = trained[name].to(parameter.device)

    yield restore
    restore()
    trained.clear()


@contextlib.contextmanager
def head_in_place() -> Iterator[None]:
    """Have the fused head take the memory on a CPU that it takes on a GPU. Its results are not computed.

    On a GPU it changes a tile of logits in place with Triton kernels, and adds products in fp32 to gradients. On a CPU
    each of these steps makes a tensor.
    """

    def fold(tile: Tensor, stride: int, targets: Tensor, highest: Tensor, total: Tensor, *_: Any, **__: Any) -> None:
        highest.zero_()
        total.fill_(1)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    names = "_forward_tile", "_backward_tile", "_addmm_fp32"
    former = [getattr(chunked_logprob, name) for name in names]
    for name, function in zip(names, (fold, nothing, nothing), strict=True):
        setattr(chunked_logprob, name, function)
    try:
        yield
    finally:
        for name, function in zip(names, former, strict=True):
            setattr(chunked_logprob, name, function)
