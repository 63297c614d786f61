import json


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_a_finished_run_is_recorded(run_stage, capsys) -> None:
    folder = run_stage("sft", "--plugin", "my-thing")
    (note,) = map(json.loads, (folder.parent / "notes.jsonl").read_text().splitlines())

    assert note["run"] == str(folder)
    assert note["eval_loss"] == json.loads((folder / "alignkit.json").read_text())["metrics"]["eval_loss"]
    assert "my-thing: checkpoint at step 2" in capsys.readouterr().out
