"""Sample answers to the prompts of a file into another file. Importing this module imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from alignkit.generation.chat import ModelSource, locate
from alignkit.generation.rankings import continued, prompts_of, short
from alignkit.rows import Conversation

Progress = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]  # description, total, done


class SampleFile(NamedTuple):
    """A file of samples, as far as it is written."""

    file: Path
    source: ModelSource
    prompts: list[Conversation]
    k: int  # answers per prompt
    batch: int  # prompts per batch
    done: int  # prompts that are answered


def plan(run: str, prompts: str, file: Path, k: int, batch: int) -> SampleFile:
    """Check what is to be sampled, and how much of it an earlier command has written.

    Raises:
        AlignkitError: the model or the prompts are not usable.
        ConfigError: the file has other prompts, or another K.
    """
    source, rows = locate(run), prompts_of(prompts)
    return SampleFile(file, source, rows, k, batch, continued(file, rows, k, batch))


def write(
    samples: SampleFile, max_new_tokens: int, temperature: float, top_p: float, seed: int, progress: Progress
) -> None:
    """Sample the answers that are missing, batch by batch. A killed command loses one batch."""
    import transformers

    from alignkit.batches import Sampling
    from alignkit.data.chat_template import prompt_ids
    from alignkit.generation.chat import open_model
    from alignkit.generation.sampling import sample, text

    file, source, prompts, k, batch, done = samples
    opened = open_model(source)
    sampling = Sampling(max_new_tokens, temperature, tuple(opened.stop_ids), top_p, samples=k)
    with file.open("a", encoding="utf-8") as stream, progress("sampling", len(prompts), done) as advance:
        for start in range(done, len(prompts), batch):
            chunk = prompts[start : start + batch]
            transformers.set_seed(seed + start)  # a continued file equals one written without interruption
            ids = [prompt_ids(opened.tokenizer, row) for row in chunk]
            sampled = sample(opened.model, opened.tokenizer, ids, sampling)
            answers = [text(opened.tokenizer, answer) for answer in sampled]
            lines = [{"prompt": short(row), "responses": answers[i * k : i * k + k]} for i, row in enumerate(chunk)]
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            stream.flush()
            advance(len(chunk))
