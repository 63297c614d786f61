"""What ``alignkit compare`` compares, and what comes out. No torch here: mistakes are told before it is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignkit import data
from alignkit.config import DataConfig
from alignkit.data import reading
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.evaluation import error_bars, judges
from alignkit.evaluation.judges import Judge
from alignkit.generation import rankings
from alignkit.registry import Registry
from alignkit.rows import Conversation, Text
from alignkit.runs import lineage, manifest
from alignkit.runs.lineage import Parent


def runs_of(paths: Sequence[str]) -> list[Parent]:
    """The finished policies in these folders.

    Raises:
        ConfigError: fewer than two, one twice, one that is no policy, or two that do not write in the same tokens.
    """
    if len(paths) < 2:
        raise ConfigError("compare takes two runs or more; the first is what the others are compared with")
    runs = [lineage.named("compare", path, "policy") for path in paths]
    for number, run in enumerate(runs):
        if any(run.folder.resolve() == other.folder.resolve() for other in runs[:number]):
            raise ConfigError(f"compare: {run.folder} is named twice")
        lineage.check_same_tokens(runs[0], run)
    return runs


def newest_judge(runs: Sequence[Parent]) -> Judge:
    """The newest reward run that is known here: that the runs were trained against, or in the folders beside them.

    Raises:
        ConfigError: none is known.
    """
    folders = [Path(run["folder"]) for record in map(_record, runs) for run in record["parents"].values()]
    folders += [beside for run in runs for beside in sorted(run.folder.absolute().parent.iterdir())]
    known = [(manifest.read(folder), folder) for folder in folders if _is_finished(folder)]
    rewards = [(record["finished"], folder) for record, folder in known if record["role"] == "reward"]
    if not rewards:
        raise ConfigError(
            "no reward model is known to these runs or beside them: name one with --reward RUN (of stage rm), or a "
            "function of prompts and answers with --reward module:function, or a reward of a plugin with --reward NAME"
        )
    _, folder = max(rewards, key=lambda found: found[0])
    if folder.absolute().is_relative_to(Path.cwd()):
        folder = folder.absolute().relative_to(Path.cwd())
    return judges.of_run(lineage.named("--reward", str(folder), "reward"))


class Prompts(NamedTuple):
    """What the runs are asked."""

    prompts: list[Conversation]
    source: str
    trained_on: int  # how many of them some run was trained on, as far as is known
    unknown: list[str]  # runs whose training data cannot be read, and why


def prompts_of(said: str | None, runs: Sequence[Parent], limit: int) -> Prompts:
    """The prompts of the rows at ``said``, else those that some run held out and none was trained on; at most so many.

    Raises:
        ConfigError: there are none.
    """
    trained, held_out, unknown = set[str](), dict[str, Conversation](), []
    for run in runs:
        try:
            train_rows, eval_rows = _rows(_record(run))
        except AlignkitError as error:
            unknown.append(f"{run.folder}: {error}")
            continue
        trained |= {json.dumps(prompt) for prompt in _prompts(train_rows)}
        without_tools = [located for located in eval_rows if not rankings.has_tools(located.row)]  # none is handed over
        held_out |= {json.dumps(prompt): prompt for prompt in _prompts(without_tools)}
    if said is not None:
        prompts = rankings.prompts_of(said)[:limit]
        return Prompts(prompts, said, sum(json.dumps(prompt) in trained for prompt in prompts), unknown)
    new = [prompt for key, prompt in held_out.items() if key not in trained][:limit]
    if not new:
        raise ConfigError("no prompt was held out by one of these runs and not trained on by another: add --data")
    return Prompts(new, "held out by the runs", 0, unknown)


def _rows(record: dict[str, Any]) -> tuple[list[data.Located], list[data.Located]]:
    """The rows that a run was trained on, and those that it held out."""
    registry = Registry()
    for plugin in record["config"]["plugins"]:
        registry.activate(plugin)
    config = DataConfig(**record["config"]["stages"][record["stage"]]["data"])
    accepts = registry.stage(record["stage"]).rows
    source = data.load(registry, config, str(config.path), accepts)
    if source.fingerprint != record["data"]["fingerprint"]:
        raise DataError(f"{config.path} has changed since")
    if config.eval_path is None:
        train_rows, eval_rows = reading.hold_out(source.rows, config.eval_size, config.seed)
        if len(eval_rows) != record["data"]["eval_rows"]:  # an earlier version could hold out a prompt with most rows
            raise DataError(
                f"the split is now {len(eval_rows)} held-out rows, the run had {record['data']['eval_rows']}"
            )
        return train_rows, eval_rows
    split = DataConfig(**{**vars(config), "split": config.eval_split or config.split})
    return source.rows, data.load(registry, split, config.eval_path, accepts).rows


def _prompts(rows: Iterable[data.Located]) -> list[Conversation]:
    return [rankings.prompt_of(row) for _, row in rows if not isinstance(row, Text)]


def _record(run: Parent) -> dict[str, Any]:
    assert run.manifest is not None
    return run.manifest


def _is_finished(folder: Path) -> bool:
    return manifest.is_run(folder) and not folder.name.endswith(".unfinished")


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """One run's answers to the N prompts, and what is known of them."""

    texts: list[str]
    lengths: list[int]  # tokens
    ended: list[bool]
    kl: list[float]  # log-probability under the run itself less that under the first, an answer each
    prompt_ids: list[list[int]] = field(default_factory=list)
    answer_ids: list[list[int]] = field(default_factory=list)


def figures(run: Parent, answered: Answered, scores: Sequence[float], first: Sequence[float] | None) -> dict[str, Any]:
    """A run's row of the table. ``first`` are the scores of the first run's answers to the same prompts.

    A tie is half a win; every ``..._error`` is the standard error of its mean over prompts.
    """
    row: dict[str, Any] = {"run": str(run.folder), "stage": run.stage, **_mean("score", scores)}
    row |= {"win_rate": None, "win_rate_error": None}
    if first is not None:
        row |= _mean("win_rate", [(a > b) + 0.5 * (a == b) for a, b in zip(scores, first, strict=True)])
    row |= _mean("kl", answered.kl) | _mean("length", answered.lengths)
    return {**row, "eos_rate": sum(answered.ended) / len(answered.ended), "prompts": len(answered.ended)}


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {name: sum(values) / len(values), f"{name}_error": None, **error_bars.named(f"{name}_error", values)}


# --- what comes out --------------------------------------------------------------------------------------------------


def write_rows(file: Path, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """The table as JSON, a run a line."""
    lines = (json.dumps({**row, **more}, ensure_ascii=False) + "\n" for row in rows)
    manifest.write_atomically(file, "".join(lines))


def plot(file: Path, rows: Sequence[dict[str, Any]], reward: str) -> None:
    """The runs as points of score over KL, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        errors = {"xerr": row["kl_error"], "yerr": row["score_error"]}
        axes.errorbar(row["kl"], row["score"], **errors, fmt="o", capsize=3, label=row["run"])
    axes.set_xlabel(f"KL to {rows[0]['run']} (nats an answer)")
    axes.set_ylabel(f"score by {reward}")
    axes.legend()
    axes.grid(alpha=0.3)
    beside = file.with_name(f".{file.name}.unfinished")
    figure.savefig(beside, format="png", dpi=150)
    beside.replace(file)
