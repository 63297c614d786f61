"""``alignkit report``: what the page says of runs, and of folders that are none."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ppo_runs import PROMPTS, ppo
from reported_runs import AFTER, BEFORE, losses, scores, write_answers, write_lines, write_pipeline, write_run
from transformers import AutoTokenizer

from alignkit.cli import main
from alignkit.reporting import report, views
from alignkit.reporting.folders import find
from alignkit.reporting.lineage import lineage
from alignkit.reporting.results import changes, win_rate
from alignkit.runs import answers

OLD = sorted((Path(__file__).parent / "old_runs").glob("*.tar.xz"))


def words(html: str) -> str:
    """The text of a page, on one line."""
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


# --- what a run changed ----------------------------------------------------------------------------------------------


def test_a_change_is_paired_by_prompt_where_the_answers_have_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ppo", "ppo", scores())
    (run,), _ = find([folder])
    unpaired = {each.metric: each for each in changes(run, [])}["score"]
    write_answers(folder)
    paired = {each.metric: each for each in changes(run, answers.read(folder))}["score"]

    assert unpaired.difference == pytest.approx((1.25, 0.6 * 2**0.5))
    assert (unpaired.verdict, unpaired.paired) == ("no measurable change", False)
    assert paired.difference == pytest.approx((1.25, 0.47871), abs=1e-5)  # of 1, 2, 0, 2
    assert (paired.verdict, paired.paired) == ("improved", True)


def test_answers_of_another_evaluation_are_not_paired(tmp_path: Path) -> None:
    """Their differences are not those of the metric."""
    folder = write_run(tmp_path / "ppo", "ppo", scores())
    (run,), _ = find([folder])
    write_answers(folder, after=[9.0, 9.0, 9.0, 9.0])

    change = {each.metric: each for each in changes(run, answers.read(folder))}["score"]
    assert change.difference == pytest.approx((1.25, 0.6 * 2**0.5))
    assert not change.paired


def test_a_metric_that_is_not_finite_at_the_end_has_not_improved(tmp_path: Path) -> None:
    """Such as the score, if the reward rejected all answers: the last finite one is not that of the run."""
    *training, end = scores()
    middle = {"step": 4, "eval_score": 9.0, "eval_score_error": 0.1}
    write_run(tmp_path / "ppo", "ppo", [*training, middle, {**end, "eval_score": None}])
    page = words(report([tmp_path]).html)

    assert "score 1.50 ± 0.60 → not a number not finite at the last evaluation" in page
    assert "no comparison" in page
    assert "improved" not in page


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [(4.0, 3.0, "improved"), (3.0, 4.0, "got worse"), (3.0, 2.9, "no measurable change")],
)
def test_a_loss_is_better_if_it_is_lower(first: float, last: float, verdict: str, tmp_path: Path) -> None:
    (run,), _ = find([write_run(tmp_path / "sft", "sft", losses(first, last))])
    by_name = {each.metric: each for each in changes(run, [])}

    assert by_name["loss"].verdict == verdict
    assert by_name["perplexity"].verdict == "no error recorded"


def test_the_win_rate_counts_a_tie_as_half_and_has_an_interval(tmp_path: Path) -> None:
    write_answers(tmp_path)
    rate = win_rate(answers.read(tmp_path))

    assert rate is not None
    assert (rate.wins, rate.ties, rate.losses, rate.rate) == (3, 1, 0, 0.875)
    assert rate.interval == pytest.approx((0.3958, 0.9868), abs=1e-4)
    write_lines(tmp_path / "answers.jsonl", [{"prompt": "p", "before": "a", "after": "b", "score": 1.0}])
    assert win_rate(answers.read(tmp_path)) is None  # an earlier version: the former answers have no scores


# --- what was trained from what --------------------------------------------------------------------------------------


def edges(folder: Path) -> set[tuple[str, str, str]]:
    return {(edge.source.title, edge.target.title, edge.role) for edge in lineage(find([folder])[0]).edges}


PIPELINE = {
    *(("smollm2-135m", "sft", "policy"), ("sft", "rm", "policy")),
    *(("sft", "ppo", "policy"), ("rm", "ppo", "reward")),
}


def test_the_lineage_has_the_runs_that_a_run_started_from(tmp_path: Path) -> None:
    assert edges(write_pipeline(tmp_path / "runs")) == PIPELINE


def test_runs_that_were_moved_are_found_by_their_weights(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "runs").rename(tmp_path / "copied")

    assert edges(tmp_path / "copied") == PIPELINE


def test_a_parent_outside_of_the_report_is_drawn_and_one_that_is_gone_too(tmp_path: Path) -> None:
    runs = write_pipeline(tmp_path / "runs")
    shutil.rmtree(runs / "rm")
    graph = lineage(find([runs / "ppo"])[0])

    assert {node.title: node.kind for node in graph.nodes.values()} == {
        **{"ppo": "run", "smollm2-135m": "model", "runs/sft": "outside", "runs/rm": "missing"}
    }


def test_a_parent_that_was_trained_again_is_named(tmp_path: Path) -> None:
    runs = write_pipeline(tmp_path / "runs")
    shutil.rmtree(runs / "sft")
    write_run(runs / "sft", "sft", losses(4.0, 2.0), fingerprints={"weights": "others"})

    stale = [(edge.source.title, edge.target.title) for edge in lineage(find([runs])[0]).stale]
    assert sorted(stale) == [("sft", "ppo"), ("sft", "rm")]
    assert "sft was trained again after ppo used it" in words(report([runs]).html)


def test_the_drawing_puts_runs_after_their_parents_and_in_places_of_their_own(tmp_path: Path) -> None:
    runs = write_pipeline(tmp_path / "runs")
    for seed in (2, 3):
        write_run(runs / f"seed-{seed}" / "ppo", "ppo", scores(), {"policy": runs / "sft", "reward": runs / "rm"})
    graph = lineage(find([runs])[0])
    places = {node.title: (node.depth, node.lane) for node in graph.nodes.values()}

    assert len(set(places.values())) == len(places) == 6
    assert all(edge.source.depth < edge.target.depth for edge in graph.edges)
    assert {places[name][0] for name in ("ppo", "seed-2/ppo", "seed-3/ppo")} == {3}


# --- runs of all kinds -----------------------------------------------------------------------------------------------


@pytest.fixture(params=OLD, ids=[file.name.partition(".")[0] for file in OLD])
def old_runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of earlier versions, finished and killed, whose absolute paths are those of another machine."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_of_earlier_versions_finished_or_not(
    old_runs: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made = report([Path("finished"), Path("cut")])
    page = words(made.html)

    assert (made.runs, made.not_shown) == (10, [])
    assert page.count("stopped at step 2") >= 5
    assert ("no error recorded" in page) is ("61ce16d" not in request.node.name)  # that version recorded them
    drawn = {tuple(n.rpartition("/")[2] for n in e) for e in edges(Path("finished/lora"))}
    assert drawn & {("sft", "ppo", "policy"), ("sft", "grpo", "policy")}
    capsys.readouterr()
    commands = re.findall(r"<code>(alignkit train --plugin sft[^<]*)</code>", made.html)
    (command,) = {each for each in commands if "cut/lora" in each}
    assert main(shlex.split(command)[1:]) == 0  # it continues the run, as the page says
    assert json.loads(Path("cut/lora/sft/alignkit.json").read_text())["steps"] == 4


def test_folders_that_are_no_runs_and_files_that_cannot_be_read_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    runs = write_pipeline(tmp_path / "runs")
    (runs / "notes").mkdir()
    (runs / "notes" / "readme.txt").write_text("nothing")
    for name, content in {
        "cut": '{"manifest_version": 2, "sta',
        "other": "{}",
        "list": "[]",
        "few": '{"manifest_version": 2}',
    }.items():
        (runs / name).mkdir()
        (runs / name / "alignkit.json").write_text(content)
    metrics = runs / "ppo" / "metrics.jsonl"
    metrics.write_bytes(b"\xff\xfe\n[1]\n" + metrics.read_bytes() + b'{"step": 9, "sco')
    (runs / "ppo" / "answers.jsonl").write_text('{"step": 0}\n{"prompt": 3}\n[]\nnull\n')
    (runs / "rm" / "pairs.json").write_text('{"by_distance": 3}')
    (runs / "comparison.jsonl").write_text('{"run": "runs/ppo", "score": 1.0, "score_error": 0.1}\nnull\n')

    made = report([runs])
    page = words(made.html)
    assert made.runs == 3
    assert {"cut", "few", "list", "notes", "other"} <= {each.name for each in made.not_shown}
    assert "notes : not a run: it has no alignkit.json" in page
    assert "other was written by an incompatible version of alignkit" in page
    assert "ppo : 3 lines of metrics.jsonl cannot be read, and left out" in page
    assert "rm : pairs.json cannot be read: " in page
    assert "comparison.jsonl, line 2 : not a row of alignkit compare" in page
    assert "score 1.50 ± 0.60 → 2.75 ± 0.60" in page  # ppo's, from the lines that can be read


def test_a_run_that_is_named_in_several_ways_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = write_pipeline(tmp_path / "runs")
    (runs / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    found, not_shown = find([Path("runs"), runs, Path("runs/../runs/ppo")])

    assert sorted(run.name for run in found) == ["ppo", "rm", "sft"]
    assert [each.name for each in not_shown] == ["notes"]


def test_a_report_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()

    assert main(["report", str(tmp_path / "runs")]) == 2
    assert f"report: no run found in {tmp_path / 'runs'}" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run")]) == 2
    assert f"report: there is no folder {tmp_path / 'run'}. Did you mean 'runs'?" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_is_not_finished_has_the_command_that_continues_it(tmp_path: Path) -> None:
    runs = write_pipeline(tmp_path / "my runs")
    unfinished = (runs / "ppo").rename(runs / "ppo.unfinished")
    (unfinished / "alignkit.json").unlink()

    made = report([runs])
    page = words(made.html)
    assert "3 runs on bundled:smollm2-135m: " in page
    assert "1 not finished. Training took 3 min 00 s" in page
    assert "stopped at step 8" in page
    assert f"To continue: alignkit train --plugin ppo --output &#39;{runs}&#39; --resume" in page
    assert report([runs / "ppo"]).runs == 1  # by the name that it will have


def test_scores_of_different_rewards_are_not_drawn_together(tmp_path: Path) -> None:
    from alignkit.reporting.charts import frontiers
    from alignkit.runs import frontier

    runs = write_pipeline(tmp_path / "runs")
    other = write_run(runs / "rm-2", "rm", [])
    write_run(runs / "ppo-2", "ppo", scores(), {"policy": runs / "sft", "reward": runs / "rm"})
    write_run(runs / "ppo-3", "ppo", scores(), {"policy": runs / "sft", "reward": other})
    found, _ = find([runs])
    drawn = frontiers(found, {run.name: frontier.points(run.folder) for run in found})

    assert sorted(sorted(run.name for run in each.runs) for each in drawn) == [["ppo", "ppo-2"], ["ppo-3"]]

    for name, weights in (("ppo", "a"), ("ppo-2", "a"), ("ppo-3", "b")):  # `compare --checkpoints`, by relative names
        row = {"step": 0, "kl": 0, "score": 1, "gold": 0.5, "score_by": "score by runs/rm", "gold_by": "wins by local"}
        write_lines(runs / name / "frontier.jsonl", [{**row, "rewards": [{"path": weights}, None]}])
    drawn = frontiers(found, {run.name: frontier.points(run.folder) for run in found})
    assert sorted(sorted(run.name for run in each.runs) for each in drawn) == [["ppo", "ppo-2"], ["ppo-3"]]
    assert [panel.title for panel in drawn[0].panels] == ["score by runs/rm", "wins by local"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_page_is_written_into_the_folder_and_says_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_pipeline(tmp_path / "runs")

    assert main(["report", str(runs)]) == 0
    assert re.search(r"report.html: 3 runs, [\d.]+ kB", capsys.readouterr().out)
    page = words((runs / "report.html").read_text(encoding="utf-8"))
    for part in (
        "3 runs on bundled:smollm2-135m: 2 improved, 1 with no error recorded. Training took 4 min 30 s.",
        "change +1.25 ± 0.48, paired by prompt; beats its former answers on 88% of 4 prompts (95% interval 40% to 99%)",
        "usable for PPO: 70.0%",
        "median 62, longest 214",
        "alignkit train -c",
        "matplotlib, which draws the pictures, is not installed",  # as in most tests: see conftest.py
    ):
        assert part in page, part
    assert main(["report", str(runs / "sft"), str(runs / "rm"), "--output", str(tmp_path / "two.html")]) == 0
    assert "2 runs on" in words((tmp_path / "two.html").read_text(encoding="utf-8"))


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    runs = write_pipeline(tmp_path / "runs")
    heavy = "torch", "transformers", "trl", "peft", "accelerate", "datasets"
    code = (
        f"from alignkit.cli import main; main(['report', '{runs}']); import sys; print({set(heavy)} & {{*sys.modules}})"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    assert "<svg" in (runs / "report.html").read_text(encoding="utf-8")


@pytest.mark.draws_curves
def test_fifty_runs_take_less_than_a_megabyte_a_pipeline(tmp_path: Path) -> None:
    for seed in range(17):
        write_pipeline(tmp_path / f"seed-{seed}", [f"{'long answer ' * 30}{n}" for n in range(32)])

    made = report([tmp_path])
    assert made.runs == 51
    assert len(made.html.encode()) < 17e6
    assert len(report([tmp_path / "seed-3"]).html.encode()) < 1e6
    assert AFTER != BEFORE


def test_the_report_on_runs_that_were_just_trained(below: Callable[[str], list[str]]) -> None:
    parents = below("lora")
    run = ppo(*parents, "--output", "below-lora", "ppo.iterations=2")
    made = report([Path("below-lora")])
    page = words(made.html)

    assert (made.runs, made.not_shown) == (3, [])
    assert "cannot be read" not in page
    assert edges(Path("below-lora")) == {
        ("base", *edge[1:]) if edge[0] == "smollm2-135m" else edge for edge in PIPELINE
    }
    assert "paired by prompt; beats its former answers on" in page
    assert "no pairs.json" not in page
    assert "the first 4 of 4 held-out prompts" in page
    tokenizer = AutoTokenizer.from_pretrained(run)
    held_out = {answer.prompt.start for view in [views.view(find([run])[0][0], 1)] for answer in view.twenty}
    rows = [row["prompt"] for row in PROMPTS if row["prompt"] not in held_out]
    tokens = [
        len(tokenizer.apply_chat_template([{"role": "user", "content": row}], add_generation_prompt=True)["input_ids"])
        for row in rows
    ]
    lengths = json.loads((run / "alignkit.json").read_text())["data"]["lengths"]
    assert lengths == {"rows": 8, "median": statistics.median(tokens), "longest": max(tokens)}
    assert f"median {statistics.median(tokens):,.0f}, longest {max(tokens)}" in page
