"""``alignkit runs``, ``show`` and ``clean``: what is there, how to continue it, and what can be deleted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from reported_runs import scores, write_run

from alignkit.cli import main
from alignkit.runs import lock


@pytest.fixture
def runs(train: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a finished run, a stopped one, a run of another version and a folder that is no run."""
    folder = train("train.max_steps=2", "data.eval_size=2", output="listed")
    parent = folder.parent
    stopped = Path(shutil.copytree(folder, parent / "longer.unfinished"))
    (stopped / "alignkit.json").unlink()
    other = Path(shutil.copytree(folder, parent / "older"))
    (other / "alignkit.json").write_text('{"manifest_version": 1}')
    (parent / "notes").mkdir()
    return parent


def output(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main([*arguments]) == status
    return capsys.readouterr().out


def test_runs_are_listed_with_their_results_and_what_is_not_finished(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "runs", str(runs))
    rows = {row["run"]: row for row in json.loads(output(capsys, "runs", str(runs), "--json"))}
    recorded = json.loads((runs / "sft" / "alignkit.json").read_text())["metrics"]

    assert set(rows) == {"sft", "longer"}
    assert (rows["sft"]["state"], rows["sft"]["step"], rows["sft"]["stage"]) == ("finished", 2, "sft")
    assert rows["sft"]["after"] == pytest.approx(recorded[f"eval_{rows['sft']['metric']}"])
    assert rows["longer"]["state"] == "stopped"
    assert f"longer is not finished. Continue it: alignkit train --plugin sft --output {runs} --resume" in text
    assert "not shown: older: " in text
    assert "not shown: notes: not a run" in text
    assert "now" in text


def test_a_run_is_shown_with_its_data_its_results_and_its_command(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = output(capsys, "show", str(runs / "sft"))
    record = json.loads(output(capsys, "show", str(runs / "sft"), "--json"))

    assert f"again  alignkit train -c {runs / 'sft' / 'config.yaml'} --output again" in text
    assert f"{record['data']['train_rows']} rows from" in text
    assert "perplexity" in text
    assert record == json.loads((runs / "sft" / "alignkit.json").read_text())
    assert main(["show", str(runs)]) == 2
    assert "contains several runs" in capsys.readouterr().err
    for inside, path in ((runs / "sft", "."), (runs / "sft" / "checkpoints", "..")):
        monkeypatch.chdir(inside)
        assert output(capsys, "show", path) == text
        assert [row["run"] for row in json.loads(output(capsys, "runs", path, "--json"))] == ["sft"]
    assert main(["show", str(runs / "older")]) == 2
    assert "incompatible version" in capsys.readouterr().err


def test_clean_deletes_checkpoints_of_finished_runs_after_asking(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = runs / "sft" / "checkpoints"
    stopped = runs / "longer.unfinished"
    assert checkpoints.is_dir()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["clean", str(runs)]) != 0  # nobody answered
    assert checkpoints.is_dir()

    size = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    assert f"{size / 1000:.3g}"[:2] in output(capsys, "clean", str(runs), "--yes")
    assert not checkpoints.exists()
    assert (runs / "sft" / "alignkit.json").exists()
    assert stopped.exists()
    assert "nothing to delete" in output(capsys, "clean", str(runs), "--yes")
    output(capsys, "clean", str(runs), "--yes", "--unfinished")
    assert not stopped.exists()


def test_clean_leaves_a_run_that_trains_unseen_and_a_folder_that_cannot_be_deleted(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock says so. The process of a container is not seen, and a run may be resumed before the question is
    answered."""
    stopped, checkpoints = runs / "longer.unfinished", runs / "sft" / "checkpoints"
    checkpoints.rename(runs / "elsewhere")
    checkpoints.symlink_to(runs / "elsewhere")
    with lock.held(stopped):
        (runs / ".longer.unfinished.lock").write_text("99999999")  # no process here
        text = output(capsys, "clean", str(runs), "--yes", "--unfinished")

    assert stopped.is_dir()
    assert f"not deleted: {stopped}: the run is training" in text
    assert f"not deleted: {checkpoints}: " in text
    assert "freed 0 B" in text


def test_a_result_that_is_not_finite_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *training, end = scores()
    write_run(tmp_path / "ppo", "ppo", [*training, {**end, "eval_score": None}])

    (row,) = json.loads(output(capsys, "runs", str(tmp_path), "--json"), parse_constant=pytest.fail)
    assert (row["metric"], row["before"], row["after"]) == ("score", 1.5, None)
