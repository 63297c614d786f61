"""Trains on rows while they are read, and resumes at the same row (``data.streaming``).

Each process reads the stream by itself and makes examples of its share of the rows, without an end: where the stream
ends, it begins again. The number of examples that a step has trained on is that of its batches. So a checkpoint needs
only the position of the block in which the last of them lies.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, IterableDataset

from alignkit.data.encoding import report
from alignkit.data.reading import WrongKindError
from alignkit.data.streaming import Position, RawLocated
from alignkit.errors import DataError
from alignkit.protocols import Run
from alignkit.rows import Row
from alignkit.runs import manifest

Example = dict[str, Any]


@dataclass
class Read:
    """The rows that a process has read before a position. Rows are counted in the first epoch only."""

    examples: int = 0  # in all epochs
    rows: int = 0
    bad: int = 0  # raw rows that were skipped
    first_bad: str = ""
    notes: Counter[str] = field(default_factory=Counter)  # messages for the user


class StreamedExamples(IterableDataset[Example]):
    """The examples of this process, without an end.

    Args:
        run: a run with a stream.
        encode: row, counter of messages -> its records, as an :class:`alignkit.data.Encoder` makes them.
        accept: location of a row, its records, counter of messages -> its examples. A :class:`DataError` stops the run.
        merge: the examples of a block -> those that are trained on, as packing makes them.
    """

    def __init__(
        self,
        run: Run,
        encode: Callable[[Any, Counter[str]], list[Example]],
        accept: Callable[[str, list[Example], Counter[str]], list[Example]],
        merge: Callable[[list[Example]], Sequence[Example]] | None = None,
    ) -> None:
        assert run.stream is not None
        self.run, self.stream, self.encode, self.accept, self.merge = run, run.stream, encode, accept, merge
        self.process, train = int(os.environ.get("RANK", "0")), run.config.train
        self.seed = train.get("seed", 42) if train.get("data_seed") is None else train["data_seed"]
        self.consumed = 0  # examples that were trained on before a resume
        self.read = Read()
        self.blocks = [(Position(), Read())]  # that were begun, each with what was read before it

    def loader(self, batch_size: int, collate: Callable[[list[Example]], Any], pin_memory: bool) -> DataLoader[Example]:
        """Batches. ``accelerate`` must not prepare the loader: it would give each process a share of its share."""
        generator = torch.Generator()  # or else a resumed run would draw a number more than one without interruption
        return DataLoader(self, batch_size=batch_size, collate_fn=collate, pin_memory=pin_memory, generator=generator)

    @property
    def epoch(self) -> int:
        """The number of times that the stream was read to its end."""
        return self.blocks[-1][0].epoch

    def __iter__(self) -> Iterator[Example]:
        start, read = self.blocks[-1]
        self.read = copy.deepcopy(read)
        earlier = self.read.examples if start.row == 0 else -1  # examples before this epoch
        for position, block in self.stream.blocks(start, self.seed, self.process, self.run.processes):
            if position.epoch > self.epoch:
                self._end_epoch(earlier)
                earlier = self.read.examples
            self.blocks.append((position, copy.deepcopy(self.read)))
            examples = self._examples(block)
            for example in self.merge(list(examples)) if self.merge else examples:
                self.read.examples += 1
                if self.read.examples > self.consumed:
                    yield example

    def _examples(self, block: Sequence[RawLocated]) -> Iterator[Example]:
        counts = self.read if self.epoch == 0 else Read()
        for raw in block:
            try:
                encoded = [(where, self._records(where, row, counts)) for where, row in self.stream.rows(raw)]
            except DataError as error:
                if self.run.config.data.on_bad_row == "error" or isinstance(error, WrongKindError):
                    raise
                counts.bad += 1
                counts.first_bad = counts.first_bad or str(error)
                continue
            for where, records in encoded:
                counts.rows += 1
                yield from self.accept(where, records, counts.notes)

    def _records(self, where: str, row: Row, counts: Read) -> list[Example]:
        try:
            return self.encode(row, counts.notes)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def _end_epoch(self, earlier: int) -> None:
        """``earlier`` is the number of examples before the epoch that ends.

        Raises:
            DataError: it had no example.
        """
        if self.read.examples == earlier:
            why = f"all {self.read.bad} are bad. The first: {self.read.first_bad}" if self.read.bad else "none fits"
            whom = f" for process {self.process} of {self.run.processes}" if self.run.processes > 1 else ""
            raise DataError(f"{self.stream.source.path} has no rows to train on{whom}: {why}")
        if self.epoch == 0:
            self.run.say("the stream has ended before the last step: it is read again")

    def at(self, consumed: int) -> dict[str, Any]:
        """The state after a number of examples: the last block that begins before them."""
        position, read = [block for block in self.blocks if block[1].examples <= consumed][-1]
        return {"position": asdict(position), "read": {**vars(read), "notes": dict(read.notes)}}

    def resume(self, state: dict[str, Any] | None, consumed: int) -> None:
        """Go on after a number of examples, from a state of :meth:`at`; None reads from the beginning."""
        self.consumed = consumed
        if state is not None:
            read = replace(Read(**state["read"]), notes=Counter(state["read"]["notes"]))
            self.blocks = [(Position(**state["position"]), read)]


class StreamState(transformers.TrainerCallback):
    """Saves the position in the stream with each checkpoint, and reports what was read at the end."""

    def __init__(self, examples: StreamedExamples) -> None:
        self.examples = examples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            file = self._file(args, state)  # lost if the run was killed just after the rest of the checkpoint
            saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
            self.examples.resume(saved, self._consumed(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = self.examples.epoch  # the Trainer takes max_steps for an epoch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        manifest.write_json(self._file(args, state), self.examples.at(self._consumed(args, state)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, parts = self.examples.run, gather_object([self.examples.read])
        rows, bad = sum(part.rows for part in parts), sum(part.bad for part in parts)
        if bad:
            first = next(part.first_bad for part in parts if part.bad)
            run.skipped += bad
            run.say(f"skipped {bad} bad rows of the stream. The first: {first}")
        run.streamed_rows = rows
        report(run, sum((part.notes for part in parts), Counter[str]()), rows)
        run.say(f"read {rows} rows of the stream" + (f", {state.epoch + 1} times" if state.epoch else ""))

    @staticmethod
    def _consumed(args: Any, state: Any) -> int:
        return int(state.global_step * args.gradient_accumulation_steps * args.train_batch_size)

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"stream-{self.examples.process}.json"
