"""``alignkit compare``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit.cli import common
from alignkit.errors import ConfigError
from alignkit.evaluation import comparison, judges


def compare(
    runs: list[str] = typer.Argument(
        metavar="RUN",
        help="Run folders, compared with the first one. Then settings of the reward: reward.KEY=VALUE.",
    ),
    reward: str = typer.Option(
        None,
        "--reward",
        metavar="NAME",
        help="A reward run, module:function or a reward. Default: the newest known reward run.",
    ),
    plugin: list[str] = common.Plugins,
    data: str = typer.Option(
        None, "--data", "-d", metavar="DATA", help="Rows with prompts. Default: the held-out prompts of the runs."
    ),
    output: list[Path] = typer.Option(
        [],
        "--output",
        "-o",
        metavar="FILE",
        help="Write the table (.jsonl) or a plot of score over KL (.png). Repeatable.",
    ),
    limit: int = typer.Option(100, min=1, help="Maximum number of prompts."),
    max_new_tokens: int = typer.Option(128, min=1, help="Maximum tokens of an answer."),
    temperature: float = typer.Option(1.0, min=0.01, help="Temperature of the answers and of their KL."),
    batch: int = typer.Option(16, min=1, help="Prompts per batch."),
    seed: int = typer.Option(0, help="Random seed; the same seed gives the same answers."),
) -> None:
    """Compare runs on the same held-out prompts. Prints score, win rate, KL and length of each."""
    for file in output:
        if file.suffix not in (".jsonl", ".png"):
            raise ConfigError(f"--output {file}: the file must end in .jsonl (the table) or .png (a plot)")
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"--output {file}: no folder {file.parent}")
        if file.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(f"--output {file} needs matplotlib, which is not installed: pip install 'alignkit[plot]'")
    overrides = [word for word in runs if "=" in word and not Path(word).exists()]
    if reward is None and (unused := [*plugin, *overrides]):
        raise ConfigError(f"compare: {unused[0]} has no effect without --reward NAME")
    compared = comparison.runs_of([word for word in runs if word not in overrides])
    judge = judges.named("--reward", reward, plugin, overrides) if reward else comparison.newest_judge(compared)
    questions = comparison.prompts_of(data, compared, limit)
    typer.echo(f"{len(questions.prompts)} prompts, {questions.source}; scores by {judge.name}")
    if questions.trained_on:
        typer.echo(f"warning: one of these runs was trained on {questions.trained_on} of these prompts", err=True)
    for reason in questions.unknown:
        typer.echo(f"warning: cannot tell which prompts a run was trained on: {reason}", err=True)
    common.quiet()
    from alignkit.evaluation.answering import Asked, answer, score

    to_ask = Asked(questions.prompts, max_new_tokens, batch, seed, temperature)
    with common.progress("answering", len(compared) * len(questions.prompts)) as advance:
        answered = answer(compared, to_ask, advance)
    scores = score(judge, to_ask, answered, typer.echo)
    rows = [
        comparison.run_metrics(run, answers, own_scores, scores[0] if number else None)
        for number, (run, answers, own_scores) in enumerate(zip(compared, answered, scores, strict=True))
    ]
    _print(rows)
    for file in output:
        if file.suffix == ".png":
            comparison.plot(file, rows, judge.name)
        else:
            settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            comparison.write_rows(file, rows, reward=judge.name, **settings)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("score", f"wins over {rows[0]['run']}", f"KL to {rows[0]['run']}", "length", "ended"):
        table.add_column(heading, justify="right")
    for row in rows:
        wins = "" if row["win_rate"] is None else common.with_error(row, "win_rate", "{:.1%}")
        score, kl = common.with_error(row, "score", "{:.2f}"), common.with_error(row, "kl", "{:.1f}")
        table.add_row(row["run"], score, wins, kl, f"{row['length']:.0f}", f"{row['eos_rate']:.0%}")
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=160).print(table)
