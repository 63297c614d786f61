"""Habits for scripts and shells: ``--quiet``, ``--json`` and completion."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.cli import COMMANDS, Commands, common, main
from alignkit.evaluation import comparison
from alignkit.runs import manifest


def strictly(text: str) -> Any:
    """The one JSON value in a text, in which NaN and infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_page_names_the_commands_that_have_quiet_and_json() -> None:
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    for flag in ("--quiet", "--json"):
        has = {
            name
            for name in COMMANDS
            for parameter in Commands().get_command(None, name).params
            if flag in parameter.opts and name != "label"  # with --status
        }
        (line,) = (each for each in page.split("\n- ") if each.startswith(f"`{flag}` prints"))
        named = {word for word in COMMANDS if f"`{word}`" in line.partition(" have it")[0]}
        assert named == has


@pytest.fixture
def command(tiny_model: Callable[..., Path], tiny_data: Callable[[str], Path], tmp_path: Path) -> list[str]:
    data, model = ["--data", str(tiny_data("demonstrations"))], ["--model", str(tiny_model())]
    small = ["train.max_steps=1", "train.use_cpu=true", "data.eval_size=2", "train.per_device_train_batch_size=2"]
    return ["--plugin", "sft", *data, *model, "--output", str(tmp_path / "runs"), *small]


def test_what_a_script_reads_of_training(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same JSON again where there is nothing to train; other lines are on standard error."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")  # keep the settings of libraries, which are global
    folder = str(tmp_path / "runs" / "sft")
    assert main(["check", *command, "--json"]) == 0
    (planned,) = strictly(capsys.readouterr().out)["to_train"]
    assert (planned["folder"], planned["train_rows"], planned["config"]["plugins"]) == (folder, 14, ["sft"])

    assert main(["train", *command, "--json"]) == 0
    printed = capsys.readouterr()
    result = strictly(printed.out)
    assert list(result["trained"]) == [result["folder"]] == [folder]
    assert result["metrics"] == manifest.read(Path(folder))["metrics"]
    assert "run folder" in printed.err

    assert main(["train", *command, "--json"]) == 0
    assert strictly(capsys.readouterr().out) == {**result, "trained": {}}

    assert main(["train", *command, "--overwrite", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("done in ")
    assert printed.out.count("\n") == 1


def test_quiet_shows_warnings_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with common.only_result(quiet=True):
        print("loading")
        print("warning: half of the rows are empty")
        with common.progress("sampling", 3) as advance:
            advance(1)
    print("wrote 3 rows")
    assert tuple(capsys.readouterr()) == ("wrote 3 rows\n", "warning: half of the rows are empty\n")


def test_numbers_that_are_not_finite_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common.print_json({"score": math.nan, "rows": [math.inf, 1.0]})
    assert strictly(capsys.readouterr().out) == {"score": None, "rows": [None, 1.0]}
    comparison.write_rows(tmp_path / "table.jsonl", [{"score": math.nan}], seed=0)
    assert strictly((tmp_path / "table.jsonl").read_text()) == {"score": None, "seed": 0}


# --- completion ------------------------------------------------------------------------------------------------------


def complete(words: str, folder: Path, shell: str = "bash") -> list[str]:
    """What a shell offers after these words, as its script asks for it."""
    given = words.split(" ")
    bash = {"COMP_WORDS": "\n".join(given), "COMP_CWORD": str(len(given) - 1)}
    others = {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    env = {**os.environ, "_ALIGNKIT_COMPLETE": f"complete_{shell}", **(bash if shell == "bash" else others)}
    code = "import sys; from alignkit.cli import run; run()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder, env=env)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_commands_plugins_and_runs_are_completed(tmp_path: Path) -> None:
    for name in ("sft", "rm", "sft/checkpoints/checkpoint-1", "other/ppo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("sft", "rm", "other/ppo"):
        (tmp_path / "runs" / name / "alignkit.json").write_text("{}")

    assert complete("alignkit s", tmp_path) == ["sweep", "sample", "score", "serve", "serve-rollouts", "show"]
    assert complete("alignkit train --plugin qlo", tmp_path) == ["qlora"]
    assert "--trust-remote-code" in complete("alignkit --t", tmp_path)
    assert "--quiet" in complete("alignkit train --q", tmp_path)
    assert complete("alignkit chat runs/", tmp_path) == ["runs/other/ppo", "runs/rm", "runs/sft"]
    assert complete("alignkit evaluate ru", tmp_path) == ["runs/other/ppo", "runs/rm", "runs/sft"]
    assert complete("alignkit chat zzz", tmp_path) == [""]  # bash then completes files
    assert complete("alignkit train --plugin qlo", tmp_path, "fish")[0].startswith("qlora\t")
    assert '"qlora":' in complete("alignkit train --plugin qlo", tmp_path, "zsh")[0]


def test_completion_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, atexit; heavy = ('torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy');"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr));"
        "from alignkit.cli import run; run()"
    )
    for words in ("alignkit\nt", "alignkit\nchat\nr", "alignkit\ncheck\n--plugin\nq"):
        env = {"COMP_WORDS": words, "COMP_CWORD": str(words.count("\n")), "_ALIGNKIT_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **env}
        )
        assert done.stderr == "[]\n"


def test_the_script_of_the_shell_is_shown() -> None:
    """In bash, it completes words in a real shell."""
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell, text in (
        ("bash", "complete -o default -F"),
        ("zsh", "#compdef alignkit"),
        ("fish", "complete --command"),
    ):
        command = [sys.executable, "-m", "alignkit", "--show-completion", shell]
        shown = subprocess.run(command, capture_output=True, text=True, env=env)
        assert shown.returncode == 0, shown.stderr
        assert text in shown.stdout


def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "alignkit", "--show-completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, env=env).stdout
    lines = [
        f'alignkit() {{ {sys.executable} -m alignkit "$@"; }}',
        script.replace("$1 ) )", "alignkit ) )").replace("env COMP_WORDS", "COMP_WORDS"),
        "COMP_WORDS=(alignkit tra); COMP_CWORD=1; _alignkit_completion alignkit; echo ${COMPREPLY[@]}",
    ]
    done = subprocess.run(["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "train\n", done.stderr
