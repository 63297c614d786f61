"""Sample answers to the prompts of a file into another file. Importing this module imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from alignkit import bundled
from alignkit.data import outputs
from alignkit.data.reading import SAMPLED_FROM
from alignkit.generation.chat import ModelSource, locate
from alignkit.generation.rankings import continued, prompts_of, short
from alignkit.rows import Conversation
from alignkit.runs import base, fingerprints, rounds

Progress = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]  # description, total, done


class Settings(NamedTuple):
    """Settings for sampling answers."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


class SampleFile(NamedTuple):
    """A file of samples, as far as it is written."""

    file: Path
    source: ModelSource
    prompts: list[Conversation]
    k: int  # answers per prompt
    batch: int  # prompts per batch
    done: int  # prompts that are answered
    settings: Settings
    sampled_from: dict[str, Any]  # the field of its rows with that name
    model_kwargs: Mapping[str, Any]  # of a model by name


def plan(
    run: str,
    prompts: str,
    file: Path,
    k: int,
    batch: int,
    settings: Settings,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SampleFile:
    """Check what is to be sampled, and how much of it an earlier command has written.

    Raises:
        AlignkitError: the model or the prompts are not usable.
        ConfigError: the file's name does not end in ``.jsonl``; the file has other prompts, another K, or answers of
            another model or other settings.
    """
    outputs.check_rows("--output", file)
    source, rows = locate(run), prompts_of(prompts)
    sampled_from = _sampled_from(source, settings, (model_kwargs or {}).get("revision"))
    done = continued(file, rows, k, batch, sampled_from)
    return SampleFile(file, source, rows, k, batch, done, settings, sampled_from, model_kwargs or {})


def _sampled_from(source: ModelSource, settings: Settings, revision: str | None) -> dict[str, Any]:
    """The model, a fingerprint of its weights, the round of comparisons of its answers, and the settings."""
    located = source.name if source.manifest else base.locate(source.name, print)
    folder = base.folder_of(located, revision)
    is_folder = os.path.isdir(located) and not source.name.startswith(bundled.PREFIX)
    return {
        "model": os.path.abspath(located) if is_folder else source.name,
        "weights": fingerprints.weights(folder) if folder else None,
        "round": rounds.after(source.manifest),
        **settings._asdict(),
    }


def write(samples: SampleFile, progress: Progress) -> None:
    """Sample the answers that are missing, batch by batch. A killed command loses one batch."""
    import transformers

    from alignkit.batches import Sampling
    from alignkit.data.chat_template import prompt_ids
    from alignkit.generation.chat import open_model
    from alignkit.generation.sampling import sample, text

    file, source, prompts, k, batch, done, settings, sampled_from, model_kwargs = samples
    opened = open_model(source, model_kwargs)
    stop_ids = tuple(opened.stop_ids)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop_ids, settings.top_p, samples=k)
    with file.open("a", encoding="utf-8") as stream, progress("sampling", len(prompts), done) as advance:
        for start in range(done, len(prompts), batch):
            chunk = prompts[start : start + batch]
            transformers.set_seed(settings.seed + start)  # a continued file equals one written without interruption
            ids = [prompt_ids(opened.tokenizer, row) for row in chunk]
            sampled = sample(opened.model, opened.tokenizer, ids, sampling)
            answers = [text(opened.tokenizer, answer) for answer in sampled]
            lines = [
                {"prompt": short(row), "responses": answers[i * k : i * k + k], SAMPLED_FROM: sampled_from}
                for i, row in enumerate(chunk)
            ]
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            stream.flush()
            advance(len(chunk))
