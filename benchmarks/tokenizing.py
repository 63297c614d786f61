"""The time of tokenizing rows: each turn by itself, by alignkit on one core and on more, and from its cache.

::

    python benchmarks/tokenizing.py --rows 20000 --processes 2

Rows are conversations of four questions and answers, made of the sentences of the bundled demonstrations. Every side is
a process of its own, which reads the file, holds rows out and encodes the others; CPU time counts all its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

EACH_TURN, ONE, ALL, NEXT = "each turn by itself", "alignkit, one process", "alignkit", "alignkit, next start"


def write_rows(file: Path, rows: int) -> None:
    """Conversations of about 1.1 KB, no two the same."""
    from alignkit.bundled import DATA

    demonstrations = DATA["bundled:demonstrations"].read_text(encoding="utf-8").splitlines()
    texts = [text for line in demonstrations for text in _texts(json.loads(line))]
    sentences = [sentence for text in texts for sentence in text.split(". ") if len(sentence) < 150]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            messages = []
            for _ in range(4):
                messages.append({"role": "user", "content": draw.choice(sentences) + "?"})
                messages.append({"role": "assistant", "content": ". ".join(draw.sample(sentences, 2))})
            lines.write(json.dumps({"messages": messages}) + "\n")


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for each in (value.values() if isinstance(value, dict) else value) for text in _texts(each)]
    return [value] if isinstance(value, str) and " " in value else []


def measure(side: str, file: str, model: str, processes: int) -> dict[str, float]:
    """Read and encode the rows in this process."""
    import datasets

    from alignkit import Demonstration
    from alignkit.config import DataConfig
    from alignkit.data import SequenceEncoder, encode, load, load_tokenizer, pieces, tracing
    from alignkit.data.held_out import hold_out
    from alignkit.data.token_cache import encode_all
    from alignkit.registry import Registry
    from alignkit.runs import base

    datasets.disable_progress_bars()
    if side == EACH_TURN:  # render and tokenize every prompt, and every prompt with its answer
        tracing.TracedTemplate.__call__ = lambda *_: None  # type: ignore[method-assign]
        pieces.of = lambda *_: None  # type: ignore[assignment]
    located = base.locate(model, print)
    tokenizer = load_tokenizer(located, None)
    stop_ids = base.stop_ids(located, tokenizer)
    began, cpu = time.perf_counter(), cpu_seconds()
    rows = load(Registry(), DataConfig(), file, (Demonstration,)).rows
    train_rows, _ = hold_out(rows, None, 0)
    reading = time.perf_counter() - began
    if side == EACH_TURN:
        notes: Counter[str] = Counter()
        sequences = [each for _, row in train_rows for each in encode(tokenizer, row, stop_ids, notes)]
        columns = {"input_ids": [ids for ids, _ in sequences], "labels": [labels for _, labels in sequences]}
        dataset = datasets.Dataset.from_dict(columns)
    else:
        encoder = SequenceEncoder(tokenizer, stop_ids, max_length=1024, cut=True)
        number = 1 if side == ONE else processes
        dataset = encode_all(train_rows, encoder, skip=False, processes=number, say=lambda line: None).dataset
    taken = {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu, "reading": reading}
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    some = dataset[: min(1000, len(dataset))]
    return {**taken, "peak": max(peaks), "checksum": sum(map(sum, some["input_ids"])) + sum(map(sum, some["labels"]))}


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--skip", action="store_true", help="leave out each turn by itself, which is slow")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.file, given.model, given.processes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, given.rows)
        print(f"{given.rows} rows, {file.stat().st_size / 1e6:.0f} MB, {given.processes} processes")
        print(f"{'':<24}{'seconds':>9}{'CPU s':>9}{'ratio':>7}{'reading s':>11}{'peak MB':>9}")
        first: dict[str, float] = {}
        for side in (EACH_TURN, ONE, ALL, NEXT)[given.skip :]:
            cache = {"HF_DATASETS_CACHE": f"{folder}/{'one' if side == ONE else 'all'}"}
            command = [sys.executable, __file__, "--side", side, "--file", str(file), "--model", given.model]
            command += ["--processes", str(given.processes)]
            environment = {**os.environ, **cache, "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            taken = json.loads(done.stdout.splitlines()[-1])
            first = first or taken
            assert taken["checksum"] == first["checksum"], "the sides do not make the same tokens"
            ratio = first["cpu"] / taken["cpu"]
            print(f"{side:<24}{taken['seconds']:>9.1f}{taken['cpu']:>9.1f}{ratio:>7.2f}", end="")
            print(f"{taken['reading']:>11.1f}{taken['peak']:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
