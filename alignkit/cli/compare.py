"""``alignkit compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit import paths
from alignkit.cli import common, completion, tables
from alignkit.cli.checkpoints import along_runs
from alignkit.data import outputs
from alignkit.errors import ConfigError
from alignkit.evaluation import between_runs, comparison, picture
from alignkit.evaluation.checkpoints import policies_of
from alignkit.evaluation.comparison import Asked, Comparison
from alignkit.generation import scorers
from alignkit.generation.scorers import Scorer
from alignkit.judging import choosing
from alignkit.judging.choosing import Chosen
from alignkit.registry import Registry
from alignkit.runs import pictures

PICTURES = (".png", ".svg")


def compare(
    runs: list[str] = typer.Argument(
        metavar="RUN",
        autocompletion=completion.run_folders,
        help="Run folders, compared with the first one. Then settings: reward.KEY=VALUE, judge.KEY=VALUE.",
    ),
    checkpoints: bool = typer.Option(
        False, "--checkpoints", help="Compare the checkpoints of each run with its start: score over KL."
    ),
    reward: str = typer.Option(
        None,
        "--reward",
        metavar="NAME",
        help="A reward run, module:function or a reward. Default without --judge: the newest known reward run. With "
        "--checkpoints: a gold reward, in addition to that of training.",
    ),
    judge: str = typer.Option(
        None,
        "--judge",
        metavar="NAME",
        help="A judge that compares each run's answers with the first run's, as in `rank --by`.",
    ),
    plugin: list[str] = common.Plugins,
    data: str = typer.Option(
        None, "--data", "-d", metavar="DATA", help="Rows with prompts. Default: the held-out prompts of the runs."
    ),
    output: list[Path] = typer.Option(
        [],
        "--output",
        "-o",
        parser=paths.expand,
        metavar="FILE",
        help="Write the table (.jsonl) or a picture of score or wins over KL (.svg, .png). Repeatable.",
    ),
    as_json: bool = common.Json,
    trust: bool = common.Trust,
    limit: int = typer.Option(100, min=1, help="Maximum number of prompts."),
    max_new_tokens: int = typer.Option(128, min=1, help="Maximum tokens of an answer."),
    temperature: float = typer.Option(1.0, min=0.01, help="Temperature of the answers and of their KL."),
    batch: int = typer.Option(16, min=1, help="Prompts per batch."),
    seed: int = common.Seed,
) -> None:
    """Compare runs on the same held-out prompts. Prints score, win rate, KL and length of each.

    Example: alignkit compare runs/sft runs/ppo --output table.jsonl
    """
    _check_output(output, data)
    overrides = [word for word in runs if _is_setting(word)]
    if reward is None and judge is None and (unused := [*plugin, *overrides]):
        raise ConfigError(f"compare: {unused[0]} has no effect without --reward NAME or --judge NAME")
    with common.only_result(quiet=False, as_json=as_json):
        compared = comparison.runs_of([word for word in runs if word not in overrides], least=1 if checkpoints else 2)
        along = [policies_of(run) for run in compared] if checkpoints else None
        scorer, chosen = _named(reward, judge, plugin, overrides)
        questions = comparison.prompts_of(data, compared, limit)
        for warning in questions.warnings():
            typer.echo(f"warning: {warning}", err=True)
        asked = Asked(questions.prompts, max_new_tokens, batch, seed, temperature, questions.fields)
        of = Comparison(compared, scorer, chosen, questions.source, asked)
        result = along_runs(of, along, output, trust) if along else _between_runs(of, output)
    if as_json:
        common.print_json(result)


def _is_setting(word: str) -> bool:
    """Whether a word is a setting. The folders of a sweep have a ``=`` in their names, such as ``kl_coef=0.1/ppo``."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key and not Path(word).exists()


def _check_output(files: Sequence[Path], data: str | None) -> None:
    for file in files:
        if file.suffix not in (".jsonl", *PICTURES):
            raise ConfigError(f"--output {file}: the file must end in .jsonl (the table), .svg or .png (a picture)")
        outputs.check("--output", file, *filter(None, [data]))
        if file.suffix in PICTURES and not pictures.can_draw():
            raise ConfigError(f"--output {file} needs matplotlib, which is not installed: pip install 'alignkit[plot]'")


def _named(
    reward: str | None, judge: str | None, plugins: list[str], overrides: list[str]
) -> tuple[Scorer | None, Chosen | None]:
    """The reward and the judge that --reward and --judge name, with their settings."""
    of_judge = [word for word in overrides if reward is None or word.startswith("judge.")] if judge else []
    registry, scorer = Registry(), None
    registry.activate(*plugins)
    if reward:
        scorer = scorers.named(registry, "--reward", reward, [word for word in overrides if word not in of_judge])
    return scorer, choosing.named("--judge", judge, plugins, of_judge) if judge else None


def _between_runs(of: Comparison, output: Sequence[Path]) -> dict[str, Any]:
    """Compare the runs with the first one: print the table, write the files, and return the result for --json."""
    of = between_runs.with_scorer(of)
    typer.echo(between_runs.describe(of))
    common.quiet()
    rows, judged = between_runs.compare(of, typer.echo, common.progress)
    scorer = of.scorer
    _print(rows, scorer and scorer.name)
    for line in judged.lines if judged else []:
        typer.echo(line)
    for file in output:
        if file.suffix == ".jsonl":
            comparison.write_rows(file, rows, **between_runs.settings(of))
        else:
            metric = (
                ("score", f"score by {scorer.name}") if scorer else ("judge_win_rate", f"wins by {rows[0]['judge']}")
            )
            picture.draw(file, rows, *metric)
    return between_runs.as_json(of, rows, judged)


def _print(rows: Sequence[dict[str, Any]], scorer: str | None) -> None:
    """Print a table of the runs, and one of the pairs of each run's answers and the first run's."""
    first = rows[0]["run"]
    headings = ["run", *(["score"] if scorer else []), f"KL to {first}", "length", "ended"]
    table = []
    for row in rows:
        scores = [tables.with_error(row, "score", "{:.2f}")] if scorer else []
        kl = tables.with_error(row, "kl", "{:.1f}")
        table.append([row["run"], *scores, kl, f"{row['length']:.0f}", f"{row['eos_rate']:.0%}"])
    tables.show(headings, table)
    pairs = [(row, *by) for row in rows[1:] for by in (("", scorer), ("judge_", row.get("judge"))) if by[1]]
    headings = ["run", "by", "difference", "wins", "ties", "losses", "win rate (95 %)"]
    typer.echo(f"compared with {first}, prompt by prompt:")
    tables.show(headings, [_compared(*pair) for pair in pairs], left=2)


def _compared(row: dict[str, Any], prefix: str, name: str) -> list[str]:
    difference = "" if prefix else tables.with_error(row, "score_difference", "{:+.2f}")
    if row[f"{prefix}win_rate"] is None:
        return [row["run"], name, difference, *[""] * 4]
    shares = [f"{row[f'{prefix}{share}']:.1%}" for share in ("wins", "ties", "losses")]
    low, high = row[f"{prefix}win_rate_interval"]
    return [row["run"], name, difference, *shares, f"{row[f'{prefix}win_rate']:.1%} ({100 * low:.0f}-{100 * high:.0f})"]
