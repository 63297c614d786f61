"""Exporting runs in Python. No torch here until a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit import paths
from alignkit.api import libraries
from alignkit.api.settings import FilePath
from alignkit.exporting import source

if TYPE_CHECKING:
    from alignkit.exporting import Exported


def export(
    run: FilePath, to: FilePath, *, dtype: str = "bfloat16", base: str = "run", max_shard_size: str = "5GB"
) -> Exported:
    """Write a run as a standard Transformers model, as ``alignkit export`` does.

    Args:
        run: the run of a policy or a reward model, or its folder.
        to: the folder to write. It must not exist.
        dtype: the dtype of the weights: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        base: what an adapter is merged into: ``"run"`` is the base as it was in training, dequantized if it was
            quantized; ``"original"`` is the base as its files have it.
        max_shard_size: the largest size of a file of weights.

    Returns:
        The folder, and how the export differs from the run on texts that the run held out: ``largest_difference``,
        ``kl`` (nats per token) and ``greedy_agreement``.

    Raises:
        AlignkitError: the run cannot be exported, ``to`` exists, or the export differs from the run.
    """
    folder = paths.expand(run)
    source.read(folder)  # before torch is imported
    with libraries.prepared():
        from alignkit.exporting import export as write

        return write(folder, paths.expand(to), dtype=dtype, base=base, max_shard_size=max_shard_size)
