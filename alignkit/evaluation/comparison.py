"""The inputs of ``alignkit compare``. No torch here: errors are reported before it is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from alignkit import data
from alignkit.config import DataConfig
from alignkit.data import held_out
from alignkit.data.prompts import has_prompt, has_tools, prompt_of
from alignkit.data.streaming import RowStream
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.generation import rankings, scorers
from alignkit.generation.scorers import Scorer
from alignkit.judging.choosing import Chosen
from alignkit.registry import Registry, in_memory
from alignkit.rows import Conversation, Located
from alignkit.runs import lineage, manifest
from alignkit.runs.lineage import Parent


def runs_of(paths: Sequence[str], least: int = 2) -> list[Parent]:
    """The finished policies in these folders.

    Raises:
        ConfigError: fewer than ``least``; one is named twice or is not a policy; two differ in their tokens.
    """
    if len(paths) < least:
        if least == 1:
            raise ConfigError("compare needs at least one run")
        hint = ". To compare the checkpoints of one run, add --checkpoints" if paths else ""
        raise ConfigError(f"compare needs at least two runs; the others are compared with the first{hint}")
    runs = [lineage.named("compare", path, "policy") for path in paths]
    for number, run in enumerate(runs):
        if any(run.folder.resolve() == other.folder.resolve() for other in runs[:number]):
            raise ConfigError(f"compare: {run.folder} is named twice")
        lineage.check_same_tokens(runs[0], run)
    return runs


def newest_reward(runs: Sequence[Parent]) -> Scorer:
    """The newest reward model among the parents of these runs and the run folders beside them.

    Raises:
        ConfigError: there is none.
    """
    folders = [Path(run["folder"]) for record in map(_record, runs) for run in record["parents"].values()]
    folders += [beside for run in runs for beside in sorted(run.folder.absolute().parent.iterdir())]
    known = [(manifest.read(folder), folder) for folder in folders if _is_finished(folder)]
    rewards = [(record["finished"], folder) for record, folder in known if record["role"] == "reward"]
    if not rewards:
        raise ConfigError(
            "these runs were trained against no reward model, and their folders contain none: name one with --reward "
            "RUN (of stage rm), a function with --reward module:function, or a plugin's reward with --reward NAME"
        )
    _, folder = max(rewards, key=lambda reward: reward[0])
    if folder.absolute().is_relative_to(Path.cwd()):
        folder = folder.absolute().relative_to(Path.cwd())
    return scorers.of_run(lineage.named("--reward", str(folder), "reward"))


class Prompts(NamedTuple):
    """The prompts that all runs answer."""

    prompts: list[Conversation]
    fields: list[Mapping[str, Any]]  # the other fields of their rows
    source: str
    trained_on: int  # how many of them a run was trained on, as far as is known
    unknown: list[str]  # runs whose training data cannot be read, and why

    def warnings(self) -> Iterator[str]:
        """Notes on the prompts that limit how far to trust the results."""
        if self.trained_on:
            yield f"one of these runs was trained on {self.trained_on} of these prompts"
        for reason in self.unknown:
            yield f"cannot tell which prompts a run was trained on: {reason}"


def prompts_of(path: str | None, runs: Sequence[Parent], limit: int) -> Prompts:
    """At most ``limit`` prompts of the rows at ``path``; without it, those that a run held out and none was trained on.

    Raises:
        ConfigError: there are none.
    """
    trained, held_out, unknown = set[str](), dict[str, tuple[Conversation, Mapping[str, Any]]](), []
    for run in runs:
        try:
            record = _record(run)
            train_rows, eval_rows = rows_of(record)
        except AlignkitError as error:
            unknown.append(f"{run.folder}: {error}")
            continue
        if record["config"]["stages"][record["stage"]]["data"].get("streaming"):
            unknown.append(f"{run.folder}: it read a stream, of which only the first {len(train_rows)} rows are known")
        trained |= {json.dumps(prompt) for prompt in _prompts(train_rows)}
        for located in eval_rows:
            if not has_prompt(located.row) or has_tools(located.row):  # not sampled
                continue
            prompt, fields = prompt_of(located.row), rankings.fields_of(located)
            if fields or json.dumps(prompt) not in held_out:
                held_out[json.dumps(prompt)] = prompt, fields
    if path is not None:
        chosen = rankings.prompts_and_fields(path)[:limit]
        source, known = path, sum(json.dumps(prompt) in trained for prompt, _ in chosen)
    else:
        chosen = [asked for key, asked in held_out.items() if key not in trained][:limit]
        source, known = "held out by the runs", 0
    if not chosen:
        why = (
            "every prompt that one of these runs held out was trained on by another"
            if held_out
            else "no prompts that these runs held out are known"
        )
        raise ConfigError(f"{why}: add --data" + (f" ({'; '.join(unknown)})" if unknown else ""))
    return Prompts([prompt for prompt, _ in chosen], [fields for _, fields in chosen], source, known, unknown)


@dataclass(frozen=True)
class Asked:
    """The prompts that every run answers, and how answers are sampled."""

    prompts: list[Conversation]
    max_new_tokens: int
    batch: int  # prompts per batch
    seed: int
    temperature: float = 1.0  # of sampling and of log-probabilities
    fields: list[Mapping[str, Any]] | None = None  # the other fields of the prompts' rows

    def settings(self) -> dict[str, Any]:
        """The settings that the answers depend on."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}


class Comparison(NamedTuple):
    """A comparison: the runs, the prompts, the reward and the judge."""

    runs: list[Parent]
    scorer: Scorer | None
    judge: Chosen | None
    source: str  # of the prompts
    asked: Asked


def rows_of(record: dict[str, Any]) -> tuple[Sequence[Located], Sequence[Located]]:
    """The rows that a run was trained on, of a stream the first ones, and those that it held out."""
    registry = Registry()
    in_memory.activate_known(registry, record["config"]["plugins"])
    config = DataConfig(**record["config"]["stages"][record["stage"]]["data"])
    accepts = registry.stage(record["stage"]).rows
    stream = RowStream(registry, config, accepts) if config.streaming else None
    source = stream.source if stream else data.load(registry, config, config.path, accepts)
    if source.fingerprint != record["data"]["fingerprint"]:
        raise DataError(f"{source.path} has changed since")
    if source.format != record["data"]["format"]:
        raise DataError(f"{source.path} is now read as {source.format}, and the run read {record['data']['format']}")
    if stream and config.eval_path is None:
        return stream.split
    if config.eval_path is None:
        train_rows, eval_rows = held_out.split(source, config.eval_size, config.seed)
        if len(eval_rows) != record["data"]["eval_rows"]:  # an earlier version split otherwise
            raise DataError(
                f"its split now holds out {len(eval_rows)} rows, and the run held out {record['data']['eval_rows']}"
            )
        return train_rows, eval_rows
    split = DataConfig(**{**vars(config), "split": config.eval_split or config.split, "streaming": False})
    train_rows = stream.train_rows if stream else held_out.split(source, 0, config.seed).train
    return train_rows, data.load(registry, split, config.eval_path, accepts).rows


def write_rows(file: Path, rows: Sequence[dict[str, Any]], **columns: Any) -> None:
    """Write a table as JSON Lines, one row per line; ``columns`` are the same in every line."""
    lines = (json.dumps(manifest.plain_json({**row, **columns}), ensure_ascii=False) + "\n" for row in rows)
    manifest.write_atomically(file, "".join(lines))


def _prompts(rows: Iterable[Located]) -> list[Conversation]:
    return [prompt_of(row) for _, row in rows if has_prompt(row)]


def _record(run: Parent) -> dict[str, Any]:
    assert run.manifest is not None
    return run.manifest


def _is_finished(folder: Path) -> bool:
    return manifest.is_run(folder) and not folder.name.endswith(".unfinished")
