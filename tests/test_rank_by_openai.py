"""Commands that ask the judge `openai`: ranks, what is stored, one line for errors, and a key that is nowhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_servers import ScriptedServer, error, free_port
from test_judge_prompts import sections

from alignkit.cli import main

KEY = "sk-proj-0123456789abcdefghij"
ANSWERS = ["eight letters", "five", "a much longer answer"]


def shortest(body: dict[str, Any]) -> str:
    """The reply of a judge that prefers short answers: A, B or tie, or a ranking."""
    answers = [text for title, text in sections(body["messages"][0]["content"]) if title.startswith("answer ")]
    lengths = dict(zip("ABCDEFGHI", map(len, answers), strict=False))
    if len(answers) == 2:
        return "tie" if lengths["A"] == lengths["B"] else min(lengths, key=lambda letter: lengths[letter])
    return " > ".join(sorted(lengths, key=lambda letter: lengths[letter]))


@pytest.fixture
def rank(
    chat_server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[int]]]:
    """``rank("judge.largest=9")``: rank the file samples.jsonl -> the ranks of each row; no rows after an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chat_server.script = shortest

    def run(*arguments: str, status: int = 0) -> list[list[int]]:
        assert main([*command(chat_server.url), *arguments]) == status
        lines = [] if status else Path("ranked.jsonl").read_text().splitlines()
        return [json.loads(line)["ranks"] for line in lines]

    return run


def command(url: str) -> list[str]:
    settings = [f"judge.base_url={url}", "judge.model=m", "judge.retries=0", "judge.concurrency=1"]
    return ["rank", "samples.jsonl", "--by", "openai", "--output", "ranked.jsonl", *settings]


def write(*rows: list[str]) -> None:
    lines = [json.dumps({"prompt": f"p{number}", "responses": answers}) for number, answers in enumerate(rows)]
    Path("samples.jsonl").write_text("\n".join(lines) + "\n")


def test_pairs_and_lists_are_ranked(chat_server: ScriptedServer, rank: Callable[..., list[list[int]]]) -> None:
    write(ANSWERS, ["x", "y"])
    assert rank() == [[1, 0, 2], [0, 0]]
    assert len(chat_server.requests) == 2 * 4

    Path("ranked.jsonl").unlink()  # a ranking of other samples, which is not overwritten
    write([letter * n for n, letter in enumerate("abcdef", 1)])
    assert rank("judge.largest=9") == [[0, 1, 2, 3, 4, 5]]
    assert len(chat_server.requests) == 8 + 2


def test_a_dry_run_asks_nothing(
    chat_server: ScriptedServer, rank: Callable[..., list[list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    write(ANSWERS)
    assert main([*command(chat_server.url), "--dry-run"]) == 0

    requests, tokens = map(int, re.search(r"(\d+) requests with (\d+) tokens", capsys.readouterr().out).groups())  # type: ignore[union-attr]
    assert requests == 6
    assert 6 * 50 < tokens < 6 * 200
    assert chat_server.requests == []


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (lambda: error(401, "wrong key"), "refuses the API key (401)"),
        (lambda: error(404, "no such model"), "has no model 'm'"),
        (lambda: error(500, "broken"), "failed (500), after 0 retries"),
    ],
)
def test_an_error_keeps_the_verdicts_until_then(
    failure: Any,
    line: str,
    chat_server: ScriptedServer,
    rank: Callable[..., list[list[int]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(ANSWERS)
    chat_server.script = lambda body: failure() if len(chat_server.requests) == 5 else shortest(body)
    rank(status=2)
    message = capsys.readouterr().err.strip().splitlines()

    assert len(message) == 1
    assert line in message[0]
    assert rank() == [[1, 0, 2]]
    assert len(chat_server.requests) == 5 + 2


def test_nobody_listening_is_one_line(rank: Callable[..., list[list[int]]], capsys: pytest.CaptureFixture[str]) -> None:
    write(ANSWERS)
    rank(f"judge.base_url=http://127.0.0.1:{free_port()}/v1", status=2)

    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot be reached: ConnectionRefusedError" in message


def test_without_the_client_library_one_line_says_how_to_install_it(
    rank: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(ANSWERS)
    monkeypatch.setitem(sys.modules, "openai", None)
    rank(status=2)

    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.endswith("needs openai, which is not installed: pip install openai")


def test_a_killed_command_goes_on_without_asking_twice(
    chat_server: ScriptedServer, rank: Callable[..., list[list[int]]]
) -> None:
    write(ANSWERS, ["x", "yy"])
    killed = subprocess.Popen([sys.executable, "-m", "alignkit", *command(chat_server.url)])

    def script(body: dict[str, Any]) -> str:
        if len(chat_server.requests) == 4:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        return shortest(body)

    chat_server.script = script
    assert killed.wait(60) == -signal.SIGKILL
    assert rank() == [[1, 0, 2], [0, 1]]
    messages = [body["messages"][0]["content"] for body in chat_server.requests]
    assert len(messages) == 8 + 1  # the request that was under way is repeated
    assert len(set(messages)) == 8


def test_the_key_is_sent_and_nowhere_else(
    chat_server: ScriptedServer,
    rank: Callable[..., list[list[int]]],
    run_stage: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nor in what is left of an error that repeats it, or of a run whose reward is the judge."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    write(ANSWERS)
    rank("judge.api_key_env=JUDGE_KEY", "--report", "report.json")
    chat_server.script = lambda body: error(401, f"wrong key {KEY}")
    write(["new", "answers"])
    rank("judge.api_key_env=JUDGE_KEY", "--debug", status=2)
    chat_server.script = shortest
    judge = {"name": "openai", "base_url": chat_server.url, "model": "m", "api_key_env": "JUDGE_KEY"}
    small = [
        "ppo.batch_size=2",
        "ppo.minibatches=1",
        "ppo.response_length=6",
        "ppo.samples_per_prompt=2",
        "data.eval_size=0",
    ]
    run = run_stage(
        "ppo", "ppo.policy=base", "reward.name=judge", *small, *(f"reward.judge.{k}={v}" for k, v in judge.items())
    )

    assert {headers["authorization"] for headers in chat_server.headers} == {f"Bearer {KEY}"}
    assert '"api_key_env": "JUDGE_KEY"' in (run / "alignkit.json").read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert tmp_path / "cache" / "alignkit" / "verdicts.sqlite" in files
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err
