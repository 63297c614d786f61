"""``alignkit rank``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit import paths
from alignkit.cli import common
from alignkit.data import outputs
from alignkit.errors import ConfigError
from alignkit.evaluation.judge_report import describe_report, judge_report
from alignkit.judging import Item, OpenJudge, Outcomes, judge_answers
from alignkit.judging.choosing import Chosen, named
from alignkit.judging.judge import estimate
from alignkit.judging.ranked_rows import notes, ranked, ranked_rows
from alignkit.judging.samples import Sample, read_samples
from alignkit.runs import manifest


def rank(
    file: Path = typer.Argument(
        parser=paths.expand, metavar="FILE", help="Rows with a prompt and responses, as `alignkit sample` writes them."
    ),
    overrides: list[str] = typer.Argument(
        None, metavar="judge.KEY=VALUE", help="Settings of the judge; reward.KEY=VALUE are those of a reward."
    ),
    by: str = typer.Option(
        ...,
        "--by",
        metavar="NAME",
        help="A judge, or a scorer (higher is better): a reward run, a reward, or module:function.",
    ),
    plugin: list[str] = common.Plugins,
    batch: int = typer.Option(16, min=1, help="Answers per batch of a reward run."),
    limit: int = typer.Option(None, min=1, help="Maximum requests to the judge. Run the command again to continue."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Count the requests and their tokens without sending any."),
    report: Path = typer.Option(
        None, parser=paths.expand, metavar="FILE", help="Write the report on the judge to a JSON file."
    ),
    output: Path = typer.Option(
        None, "--output", "-o", parser=paths.expand, metavar="FILE", help="The file for the rankings."
    ),
    quiet: bool = common.Quiet,
) -> None:
    """Rank sampled answers by a judge or by score. Adds "ranks" to each row: 0 is best, equal ranks are a tie.

    A judge is asked about each pair in both orders; a pair whose verdicts differ is a tie. A row with a pair without a
    verdict is left out. Verdicts are stored, so a command that is run again asks nothing twice.

    Example: alignkit rank samples.jsonl --by local judge.model=Qwen/Qwen3-8B -o ranked.jsonl
    """
    samples = read_samples(file)
    if output is None and not dry_run:
        raise ConfigError("rank needs --output FILE for the rankings, or --dry-run")
    if output is not None:
        outputs.check_rows("--output", output, file)
        if output.exists() and not is_ranking_of(samples, output):
            raise ConfigError(f"--output {output} exists and is not an earlier ranking of {file}. Choose another file")
    if report is not None:
        outputs.check("--report", report, file)
    items = [sample.item for sample in samples]
    chosen = named("--by", by, plugin, overrides or [])
    if dry_run:
        typer.echo(describe_estimate(chosen, items))
        return
    with common.only_result(quiet):
        if chosen.loads:
            common.quiet()
        judge = OpenJudge(chosen, limit, batch, typer.echo)
        with common.progress("judging", sum(judge.way.requests(item.answers) for item in items)) as advance:
            outcomes = list(judge_answers(judge, items, advance))
    rows = ranked_rows(samples, outcomes)
    write(output, rows)
    complete = {number: outcome for number, outcome in enumerate(outcomes) if outcome is not None and outcome.complete}
    people = [samples[number].ranks for number in complete]
    found = judge_report([items[number] for number in complete], list(complete.values()), people)
    for line in (*describe_result(output, rows, chosen, judge, outcomes), *describe_report(found)):
        typer.echo(line)
    if report is not None:
        counts = {"requests": judge.asked, "stored": judge.stored, "without_verdict": judge.without_verdict}
        written = {"judge": chosen.name, "rows": len(samples), "ranked": len(complete), **counts, **found}
        manifest.write_json(report, written)


def describe_estimate(chosen: Chosen, items: Sequence[Item]) -> str:
    """The output of ``--dry-run``."""
    counted = estimate(chosen, items)
    most = "" if counted.exact else "at most "
    tokens = "" if counted.tokens is None else f" with {most}{counted.tokens} tokens in all"
    stored = f" {counted.stored} verdicts are stored already" if counted.stored else ""
    return f"{chosen.name} would get {most}{counted.requests} requests{tokens} for {len(items)} rows.{stored}"


def is_ranking_of(samples: Sequence[Sample], file: Path) -> bool:
    """Whether a file is empty, or its first row is one of these samples, apart from its ranks."""
    try:
        with file.open(encoding="utf-8") as content:
            row = json.loads(content.readline() or "null")
    except (OSError, ValueError):
        return False
    return row is None or (isinstance(row, dict) and any(row == ranked(sample, row.get("ranks")) for sample in samples))


def write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with ranks."""
    manifest.write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def describe_result(
    output: Path, rows: Sequence[dict[str, Any]], chosen: Chosen, judge: OpenJudge, outcomes: Sequence[Outcomes | None]
) -> Iterator[str]:
    """A summary: what was ranked, what was left out and why, and how to continue."""
    tied = sum(len(set(row["ranks"])) == 1 for row in rows)
    yield f"wrote {len(rows)} rankings to {output}" + (f" ({tied} of them tie all answers)" if tied else "")
    yield from notes(chosen, judge, outcomes)
