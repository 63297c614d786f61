"""``alignkit compare``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit.cli import common
from alignkit.errors import ConfigError
from alignkit.evaluation import comparison
from alignkit.evaluation.judge_report import describe_report, judge_report
from alignkit.generation import scorers
from alignkit.generation.scorers import Scorer
from alignkit.judging import Item, OpenJudge, choosing, judge_answers
from alignkit.judging.choosing import Chosen
from alignkit.registry import Registry
from alignkit.rows import Conversation
from alignkit.runs.lineage import Parent


def compare(
    runs: list[str] = typer.Argument(
        metavar="RUN",
        help="Run folders, compared with the first one. Then settings: reward.KEY=VALUE, judge.KEY=VALUE.",
    ),
    reward: str = typer.Option(
        None,
        "--reward",
        metavar="NAME",
        help="A reward run, module:function or a reward. Default without --judge: the newest known reward run.",
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
        metavar="FILE",
        help="Write the table (.jsonl) or a plot of score or wins over KL (.png). Repeatable.",
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
    if reward is None and judge is None and (unused := [*plugin, *overrides]):
        raise ConfigError(f"compare: {unused[0]} has no effect without --reward NAME or --judge NAME")
    compared = comparison.runs_of([word for word in runs if word not in overrides])
    scorer, chosen = _scorer_and_judge(compared, reward, judge, plugin, overrides)
    questions = comparison.prompts_of(data, compared, limit)
    names = [f"scores by {scorer.name}"] if scorer else []
    names += [f"judged by {chosen.name}, {_requests(chosen, compared, questions)}"] if chosen else []
    typer.echo(f"{len(questions.prompts)} prompts, {questions.source}; {'; '.join(names)}")
    if questions.trained_on:
        typer.echo(f"warning: one of these runs was trained on {questions.trained_on} of these prompts", err=True)
    for reason in questions.unknown:
        typer.echo(f"warning: cannot tell which prompts a run was trained on: {reason}", err=True)
    common.quiet()
    from alignkit.evaluation.answering import Asked, answer, score

    to_ask = Asked(questions.prompts, max_new_tokens, batch, seed, temperature, questions.fields)
    with common.progress("answering", len(compared) * len(questions.prompts)) as advance:
        answered = answer(compared, to_ask, advance)
    scores = score(scorer, to_ask, answered, typer.echo) if scorer else None
    rows = [
        comparison.run_metrics(
            run, answers, scores[number] if scores else None, scores[0] if scores and number else None
        )
        for number, (run, answers) in enumerate(zip(compared, answered, strict=True))
    ]
    lines = _add_judged(rows, chosen, questions.prompts, answered, batch) if chosen else []
    _print(rows)
    for line in lines:
        typer.echo(line)
    for file in output:
        if file.suffix == ".png":
            metric = ("score", f"score by {scorer.name}") if scorer else ("judge_win_rate", f"wins by {judge}")
            comparison.plot(file, rows, *metric)
        else:
            settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            comparison.write_rows(file, rows, reward=scorer and scorer.name, **settings)


def _scorer_and_judge(
    runs: Sequence[Parent], reward: str | None, judge: str | None, plugins: list[str], overrides: list[str]
) -> tuple[Scorer | None, Chosen | None]:
    """What scores and what judges: the newest reward run if neither is named."""
    of_judge = [word for word in overrides if reward is None or word.startswith("judge.")] if judge else []
    of_reward = [word for word in overrides if word not in of_judge]
    registry = Registry()
    registry.activate(*plugins)
    scorer = None if judge or reward else comparison.newest_reward(runs)
    if reward:
        scorer = scorers.named(registry, "--reward", reward, of_reward)
    return scorer, choosing.named("--judge", judge, plugins, of_judge) if judge else None


def _requests(chosen: Chosen, runs: Sequence[Parent], questions: comparison.Prompts) -> str:
    return f"at most {chosen.way.requests(['a', 'b']) * len(questions.prompts) * (len(runs) - 1)} requests"


def _add_judged(
    rows: list[dict[str, Any]],
    chosen: Chosen,
    prompts: Sequence[Conversation],
    answered: Sequence[comparison.Answered],
    batch: int,
) -> list[str]:
    """Add the win rates by the judge to the rows. Returns the report on the judge as lines."""
    first, *others = answered
    items = [
        Item(prompt, [a, b]) for run in others for prompt, a, b in zip(prompts, first.texts, run.texts, strict=True)
    ]
    judge = OpenJudge(chosen, None, batch, typer.echo)
    with common.progress("judging", sum(judge.way.requests(item.answers) for item in items)) as advance:
        outcomes = [outcome for outcome in judge_answers(judge, items, advance) if outcome is not None]  # no limit: all
    report = judge_report(items, outcomes)
    for number, row in enumerate(rows):
        own = outcomes[(number - 1) * len(prompts) : number * len(prompts)] if number else None
        row |= comparison.judged_metrics(chosen.name, own)
        row |= {f"judge_{name}": report[name] for name in ("consistency", "first_place", "length_correlation")}
    without = sum(not outcome.complete for outcome in outcomes)
    left_out = [f"left out {without} of {len(items)} pairs: {chosen.name} gave no verdict on them"] if without else []
    return [*left_out, *describe_report(report)]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    first = rows[0]["run"]
    columns = [("score", "score", "{:.2f}"), ("win_rate", f"wins over {first}", "{:.1%}")]
    columns += [("judge_win_rate", f"wins over {first} by {rows[0].get('judge')}", "{:.1%}")]
    columns += [("kl", f"KL to {first}", "{:.1f}")]
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in (*(heading for _, heading, _ in columns), "length", "ended"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [common.with_error(row, name, form) if row[name] is not None else "" for name, _, form in columns]
        table.add_row(row["run"], *cells, f"{row['length']:.0f}", f"{row['eos_rate']:.0%}")
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=160).print(table)
