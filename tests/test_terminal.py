"""What ``docs/security.md`` says about what is shown on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reported_runs import losses, write_run

from alignkit.cli import terminal
from alignkit.cli.terminal import Printable, printable

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"  # sets the title, clears the screen, and changes the color


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable(f"a\tb\n{ESCAPES}\r\x00\x7f\u202e\u2066é漢") == (
        r"a" + "\tb\n" + r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\x7f\u202e\u2066" + "é漢"
    )


def test_rich_keeps_its_colors_and_progress_bars_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(file=Printable(sys.stdout), force_terminal=True).print(Text("red", style="red"))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m\n"
    Printable(sys.stdout, has_progress=True).write("\r\x1b[A 50%\x1b[2J")
    assert capsys.readouterr().out == "\r\x1b[A 50%\\x1b[2J"


def on_a_terminal(*arguments: str) -> str:
    """What a command writes to a terminal, on standard output and standard error."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "alignkit", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "300"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the process has ended
            break
        if not part:
            break
        written += part
    process.wait()
    os.close(ours)
    return written.decode()


def test_names_in_run_folders_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path / f"named{ESCAPES}", "sft", losses(4.0, 3.0))
    file = run / "alignkit.json"
    record = json.loads(file.read_text())
    record["model"]["name"] = record["tuner"] = f"[red]{ESCAPES}[/nothing]"
    file.write_text(json.dumps(record))

    for command in (["show", str(run)], ["runs", str(tmp_path)], ["check", "--plugin", f"none{ESCAPES}"]):
        written = on_a_terminal(*command)
        assert r"\x1b]0;owned\x07" in written
        assert "\x07" not in written
        assert "\x1b]" not in written
        assert "\x9b" not in written
        assert not re.findall(r"\x1b(?!\[[0-9;]*m)", written)  # Rich's own styles
        if command[0] != "check":
            assert "[red]" in written


def test_answers_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """``chat`` prints what the model writes, piece by piece."""
    stream = Printable(sys.stdout)
    for piece in ("Hello \x1b", "]52;c;b3duZWQ=\x07", "!\n"):
        print(piece, flush=True, end="", file=stream)  # type: ignore[call-overload]
    assert capsys.readouterr().out == "Hello \\x1b]52;c;b3duZWQ=\\x07!\n"
    assert not terminal.cell("[red]x[/]").spans
