"""The training examples of a run that reads its rows while it trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import trl

from alignkit import DataError, Run
from alignkit.data import SequenceEncoder, check_fit
from alignkit.training import StreamedExamples

if TYPE_CHECKING:
    from alignkit_sft.config import SFTConfig

Example = dict[str, Any]


def examples(run: Run, config: SFTConfig) -> StreamedExamples:
    """The rows of the stream as ``input_ids`` and ``labels``, with ``too_long`` and ``packing`` applied."""
    encoder = SequenceEncoder(run.tokenizer, run.stop_ids, max_length=config.max_length, cut=config.too_long == "cut")
    accept = _Accept(run, config)
    return StreamedExamples(run, encoder, accept, _packer(config.max_length) if config.packing else None)


class _Accept:
    """Applies ``too_long``, and checks that the model can read the tokens."""

    def __init__(self, run: Run, config: SFTConfig) -> None:
        self.run, self.config, self.longest = run, config, 0

    def __call__(self, where: str, records: Sequence[Example], notes: Counter[str]) -> list[Example]:
        accepted, config = [], self.config
        for record in records:
            ids, length = record["input_ids"], record["length"]
            if length > config.max_length:
                if config.too_long == "error":
                    raise DataError(
                        f"{where}: {length} tokens are over {config.max_length}. Raise sft.max_length, or set "
                        "sft.too_long to skip or cut"
                    )
                notes[f"rows are over {config.max_length} tokens: {'skipped' if ids is None else 'cut'}"] += 1
            if ids is None:
                continue
            rows = self.run.limits.rows
            if len(ids) > self.longest or (rows is not None and max(ids) >= rows):
                self.longest = len(ids)
                check_fit(self.run, [(where, ids)])
            accepted.append({"input_ids": ids, "labels": record["labels"]})
        return accepted


def _packer(max_length: int) -> Any:
    def pack(examples: list[Example]) -> Sequence[Example]:
        if not examples:
            return []
        packed = trl.pack_dataset(datasets.Dataset.from_list(examples), max_length, "bfd")
        return list(packed)

    return pack
